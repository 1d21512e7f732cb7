"""Triton's interpreter in some 60% of its time: its language is patched once a kernel, not for each call of a device
function.

What it patches a second time are the same attributes in the same way. To look for them, thousands of them, is much of
what our kernels take there, which are made of small device functions.
"""

from types import ModuleType


def patch_language_once_a_kernel() -> None:
    """For this process; nothing where Triton is not there or does not work so."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    if not all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        return
    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    known, patched = {interpreter.tl, interpreter.tl.core}, set()

    def patch_once(fn):
        languages = {value for value in fn.__globals__.values() if isinstance(value, ModuleType)} & known
        if languages <= patched:
            return interpreter._LangPatchScope()  # nothing to take back
        patched.update(languages)
        return patch(fn)

    def run_kernel(self, *arguments, **named):
        patched.clear()
        return run(self, *arguments, **named)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, run_kernel
