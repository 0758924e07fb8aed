"""A child process that makes GBNF of a JSON schema and compiles it, so that a hostile one hurts nobody.

llama.cpp's grammar compiler recurses as deep as the text nests, looks for left recursion in exponential time and
prints its complaints straight to stderr. Here all that ends with the child. It reads one JSON object on standard
input (`library`, `converter`, `schema` or `grammar`, `seconds`, `bytes`) and prints one: `{"gbnf"}` or `{"error"}`.
It imports nothing but the standard library, so that it starts in about 30 ms.
"""

import ctypes
import importlib.util
import json
import sys
import threading
from typing import Any

# Smaller than the stack of any thread that compiles the grammar again later: what passes here fits there.
_STACK_BYTES = 256 * 1024
_PLAIN_CHARACTER = r'[^"\\\x7F\x00-\x1F]'
_CHARACTER = _PLAIN_CHARACTER + r' | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})'


def _limit(seconds: int, size: int) -> None:
    try:
        import resource
    except ImportError:  # Windows: the parent's time limit remains
        return
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Not the address space: libraries of a GPU build map gigabytes of it without using them.
    resource.setrlimit(resource.RLIMIT_DATA, (size, size))


def _repeat(
    item: str, least: int, most: "int | None", separator_rule: "str | None" = None, item_rule_is_literal: bool = False
) -> str:
    """GBNF for an item so many times. It replaces the converter's own, which nests one bracket for each time."""
    del item_rule_is_literal  # a literal repeats like any other item
    if most is not None and most < least:
        raise ValueError("a minimum in it is larger than its maximum")
    if most == 0:
        return '""'
    if separator_rule is None:
        return f"{item}{{{least},{'' if most is None else most}}}"
    rest = f"({separator_rule} {item}){{{max(least - 1, 0)},{'' if most is None else most - 1}}}"
    return f"({item} {rest})?" if least == 0 else f"{item} {rest}"


def _convert(converter: str, schema: str) -> str:
    spec = importlib.util.spec_from_file_location("opsin_schema_converter", converter)
    if spec is None or spec.loader is None:
        raise RuntimeError("the schema converter cannot be loaded")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module._build_repetition = _repeat  # noqa: SLF001 - see there
    # What stands in a JSON string: no control characters, and no quotation mark by way of a pattern's dot.
    module.PRIMITIVE_RULES["char"].content = _CHARACTER
    module.DOT = module.DOTALL = _PLAIN_CHARACTER
    return str(module.json_schema_to_gbnf(schema))


def _compile(library: str, gbnf: str) -> bool:
    llama = ctypes.CDLL(library)
    init = llama.llama_sampler_init_grammar
    init.argtypes, init.restype = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p], ctypes.c_void_p
    found: list[bool] = []
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=lambda: found.append(bool(init(None, gbnf.encode(), b"root"))))
    thread.start()
    thread.join()
    return found == [True]


def _plain(reason: str) -> str:
    """The converter's complaint without its own names: it fetches nothing and calls the schema "stdin"."""
    if "remote schemas" in reason:
        return "it refers to another address, and nothing is fetched: put the definitions into it"
    return reason.replace("stdin#", "#")


def _main() -> None:
    job = json.load(sys.stdin)
    answer: dict[str, str] = {}
    try:
        _limit(job["seconds"], job["bytes"])
        gbnf = job["grammar"] if job["schema"] is None else _convert(job["converter"], job["schema"])
        if len(gbnf) > job["most"]:
            answer["error"] = f"it becomes a grammar of {len(gbnf)} characters, and {job['most']} are the limit"
        elif _compile(job["library"], gbnf):
            answer["gbnf"] = gbnf
        else:
            answer["error"] = ""  # the parent reads the reason from stderr
    except KeyError as error:
        answer["error"] = f"it refers to {error}, which it does not hold"
    except RecursionError:
        answer["error"] = "it is nested too deeply"
    except MemoryError:
        answer["error"] = "it needs too much memory"
    except Exception as error:  # noqa: BLE001 - the converter raises what it likes; the parent gives it a type
        answer["error"] = _plain(str(error)) or type(error).__name__
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    _main()
