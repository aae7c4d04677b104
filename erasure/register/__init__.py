"""A register of take-down requests: who asked for what, by when it was due, what was done, and proof of all of it.

:class:`Register` is the file. :func:`erasure.register.applying.apply` erases everything in force together, from the
base; :func:`erasure.register.verifying.verify` checks that what is in force is what the register says;
:func:`erasure.register.page.page` writes it down for people. Those three load models and are imported from their own
modules, so that adding an entry takes no second. :mod:`erasure.register.signing` signs how the log ends.
"""

from erasure.register.chain import Event
from erasure.register.entries import Entry, Subject
from erasure.register.register import Register
from erasure.register.rows import Base, Settings

__all__ = ["Base", "Entry", "Event", "Register", "Settings", "Subject"]
