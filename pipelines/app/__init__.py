"""The app (``erasure app``): erase a concept in a browser, look at pictures before and after, take the file along.

``studio`` does the work and knows no browser, ``orders`` is what a form asks for, ``cards`` is HTML, and ``page`` lays
it out with gradio, which is an extra.
"""
