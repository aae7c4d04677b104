"""Files, hashes and foreign text: written whole, read within bounds, printed without effect.

Everything that this library writes goes through here, so that no half-written file is ever seen under its own name; and
everything that others wrote is read here, so that a file cannot cost more than its size or do more than hold data.
Only the standard library is imported at the top: ``erasure doctor`` prints through it where little else works.
"""

from erasure.io.files import (
    remove_partial,
    write_atomically,
    write_json,
    writing,
    writing_folder,
)
from erasure.io.hashes import (
    Content,
    blake2b,
    seed_of,
    sha256,
    sha256_file,
    sha256_json,
    tensor_bytes,
)
from erasure.io.parsing import (
    DIGITS,
    EXPANSION,
    JSON_DEPTH,
    LARGEST_JSON,
    LARGEST_YAML,
    YAML_DEPTH,
    dump_yaml,
    fault_of,
    load_yaml,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
    read_yaml,
)
from erasure.io.text import (
    HARMFUL,
    KEPT,
    NAME,
    NAME_BYTES,
    first_line,
    folder_name,
    markdown,
    plain,
    printable,
    rich_text,
    shown,
    visible,
)

__all__ = [
    "DIGITS",
    "EXPANSION",
    "HARMFUL",
    "JSON_DEPTH",
    "KEPT",
    "LARGEST_JSON",
    "LARGEST_YAML",
    "NAME",
    "NAME_BYTES",
    "YAML_DEPTH",
    "Content",
    "blake2b",
    "dump_yaml",
    "fault_of",
    "first_line",
    "folder_name",
    "load_yaml",
    "markdown",
    "parse_json",
    "parse_yaml",
    "plain",
    "printable",
    "read_bytes",
    "read_json",
    "read_yaml",
    "remove_partial",
    "rich_text",
    "seed_of",
    "sha256",
    "sha256_file",
    "sha256_json",
    "shown",
    "tensor_bytes",
    "visible",
    "write_atomically",
    "write_json",
    "writing",
    "writing_folder",
]
