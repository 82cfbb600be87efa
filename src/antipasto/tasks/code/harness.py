"""Runs in the sandbox, by itself: calls an answer on arguments and writes down what it returns.

    tests         what to do, as a literal; read and removed before the answer runs
    solution.py   the answer
    channel       {"outcomes": […], "replaced": false}; a file whose name the answer is not told

An outcome is ``{"value": result}``, the result as plain JSON data. Where the tests have expected values, a result that is not
plain data is compared by its own ``==`` and becomes ``{"equal": true or false}``. Whether outcomes are right is judged
elsewhere. Whatever is raised ends the program, and nothing is written. A run ends with exit code 10: 0 is the answer's own
doing. Starting takes most of the time, so neither `json` nor `pathlib` is imported.
"""

# ruff: noqa: PTH100, PTH107, PTH123

import builtins
import os
import sys
from _json import encode_basestring_ascii
from typing import Any

FINISHED = 10


def main() -> None:
    with open("tests", encoding="utf-8") as file:
        given = eval(file.read())
    os.remove("tests")
    with open("solution.py", "rb") as binary:
        solution = binary.read()
    channel = os.path.abspath(given["channel"])  # the answer may change the folder
    answer = type(sys)("solution")
    sys.modules["solution"] = answer  # dataclasses look their module up
    namespace, outcomes = vars(answer), []

    def run_tests() -> None:
        function = eval(given["entry"], namespace)
        for number, arguments in enumerate(given["arguments"]):
            result = function(*arguments)
            if "expected" in given and not is_exact(result):
                outcomes.append(encoded({"equal": bool(result == given["expected"][number])}))
            else:
                outcomes.append(encoded({"value": result}))

    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]  # which -S leaves out
    if given["by_name"]:
        namespace["run_tests"] = run_tests
    for name, code in (("setup", given["setup"]), ("solution.py", solution)):
        exec(compile(code, name, "exec", dont_inherit=True), namespace)
    called = namespace["run_tests"] if given["by_name"] else run_tests
    called()
    with open(channel, "w") as file:
        file.write(f'{{"outcomes": [{", ".join(outcomes)}], "replaced": {encoded(called is not run_tests)}}}')
    sys.exit(FINISHED)


def encoded(value: Any) -> str:
    r"""The JSON text of JSON data, which may be of classes that inherit from JSON's.

    Raises:
        TypeError: it is no JSON data: a tuple, a set, an object, a dict whose keys are no texts.

    Example:
        >>> print(encoded([1, 2.5, {"é": None}, True]))
        [1, 2.5, {"\u00e9": null}, true]
    """
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return encode_basestring_ascii(value)
    if isinstance(value, (int, float)):
        return int.__repr__(value) if isinstance(value, int) else float.__repr__(value)
    if isinstance(value, list):
        return f"[{', '.join(map(encoded, value))}]"
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return f"{{{', '.join(f'{encoded(key)}: {encoded(inner)}' for key, inner in value.items())}}}"
    raise TypeError(f"{type(value).__name__} is no JSON data")


def is_exact(value: Any) -> bool:
    """Whether it is JSON data of JSON's own classes.

    Example:
        >>> is_exact([1, {"a": None}]), is_exact([(1, 2)])
        (True, False)
    """
    if type(value) is dict:
        return all(type(key) is str and is_exact(inner) for key, inner in value.items())
    if type(value) is list:
        return all(map(is_exact, value))
    return value is None or type(value) in (bool, int, float, str)


if __name__ == "__main__":
    main()
