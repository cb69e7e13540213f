"""The C ABI: two shared libraries that embed Python.

``shim/`` is C: the exported functions, which check what they can and hand each call to a thread of the library's own,
and the start of Python. ``serving.py`` is what those threads run, ``calls.py`` what each call does. ``build.py`` makes
the libraries, with cffi's embedding for the way from C into Python.
"""

from __future__ import annotations
