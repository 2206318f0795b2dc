"""Writes docs/api from the docstrings of nsa_torch and the comments of csrc/nsa.h.

Reads source text only, so that it works before anything is built. `--check` writes nothing and fails when a page is
not what it should be.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nsa_torch"
TARGET = ROOT / "docs" / "api"
WIDTH = 96
SECTIONS = ("Args", "Attributes", "Parameters", "Returns", "Yields", "Raises", "Note", "Notes", "Example")

Definition = ast.FunctionDef | ast.ClassDef


# --- what is public ---


def exported() -> dict[str, set[str] | None]:
    """Modules that nsa_torch/__init__.py takes public names from, with those names; None for a whole module."""
    modules: dict[str, set[str] | None] = {"__init__": None}
    for node in ast.parse((PACKAGE / "__init__.py").read_text()).body:
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("nsa_torch."):
            names = {alias.name for alias in node.names if not alias.name.startswith("_")}
            modules[str(node.module).removeprefix("nsa_torch.")] = names
    folder = "integrations/transformers/"
    integrations: dict[str, set[str] | None] = {f"{folder}convert": {"use_nsa"}, f"{folder}cache": {"NSAModelCache"}}
    integrations[f"{folder}cache_layer"] = {"NSADynamicLayer", "NSAStaticLayer"}
    measured: dict[str, set[str] | None] = {
        "diagnostics/diagnosis": {"diagnose", "Diagnosis", "LayerDiagnosis"},
        "diagnostics/causality": {"check_causality", "CausalityReport", "Leak"},
    }
    return modules | {"reference": None, "distributed": None} | measured | integrations


def definitions(tree: ast.Module, names: set[str] | None) -> list[Definition]:
    """The public functions and classes of a module, in the order of the file."""
    found = [node for node in tree.body if isinstance(node, Definition)]
    return [node for node in found if (not node.name.startswith("_") if names is None else node.name in names)]


# --- docstrings to Markdown ---


def escape(line: str) -> str:
    """Characters that Markdown would take as markup, outside of `code`."""
    parts = line.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*<|])|(?<!\w)(_)|(_)(?!\w)", r"\\\g<0>", parts[index])
    return "`".join(parts)


ENTRY = re.compile(r"([\w*, ./-]+?)(\s*\([^)]*\))?: +(.*)")


def entries(lines: list[str]) -> Iterator[str]:
    """The text of a section: "name: meaning" lines become a list, deeper lines go on; other text is a paragraph."""
    depth = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    listed = ENTRY.match(next(line for line in lines if line.strip())[depth:])
    for line in lines:
        entry = ENTRY.match(line[depth:])
        if not listed or not line.strip():
            yield escape(line.strip())
        elif entry and not line[depth : depth + 1].isspace():
            yield f"- `{entry[1]}`{escape(entry[2] or '')}: {escape(entry[3])}"
        else:
            yield "  " + escape(line.strip())


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections such as "Args:" become lists, indented text stays as it stands."""
    docstring = re.sub(r":\w+:`|``", "`", docstring)
    lines, out = docstring.splitlines(), []
    while lines:
        line = lines.pop(0)
        title = line.rstrip(":")
        if line.endswith(":") and title in SECTIONS:
            body = []
            while lines and (not lines[0].strip() or lines[0].startswith(" ")):
                body.append(lines.pop(0))
            out += [f"**{title}**", "", *entries(body), ""] if any(map(str.strip, body)) else [escape(line)]
        elif line.startswith("    "):
            out.append(line.rstrip())
        else:
            out.append(escape(line).rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip()


# --- Python definitions ---


def parameters(arguments: ast.arguments, method: bool) -> list[str]:
    """Each parameter as it is written in a signature, with the bare / and *."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)

    def one(argument: ast.arg, default: ast.expr | None, prefix: str = "") -> str:
        annotation = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
        equals = " = " if annotation else "="
        value = ast.unparse(default).replace("'", '"') if default else ""
        return prefix + argument.arg + annotation + (equals + value if default else "")

    out = [one(*pair) for pair in zip(positional, defaults, strict=True)]
    if arguments.posonlyargs:
        out.insert(len(arguments.posonlyargs), "/")
    if arguments.vararg:
        out.append(one(arguments.vararg, None, "*"))
    elif arguments.kwonlyargs:
        out.append("*")
    out += [one(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        out.append(one(arguments.kwarg, None, "**"))
    return out[1:] if method and out and out[0].split(":")[0] in ("self", "cls") else out


def signature(name: str, function: ast.FunctionDef, method: bool, result: bool = True) -> str:
    """The signature on one line, or on as many as WIDTH asks for."""
    arrow = f" -> {ast.unparse(function.returns)}" if result and function.returns else ""
    given = parameters(function.args, method)
    line = f"{name}({', '.join(given)}){arrow}"
    if len(line) <= WIDTH:
        return line
    rows = [""]
    for part in given:
        candidate = f"{rows[-1]} {part},".strip()
        if len(candidate) + 4 > WIDTH and rows[-1]:
            rows.append(f"{part},")
        else:
            rows[-1] = candidate
    return "\n".join([f"{name}(", *(f"    {row}" for row in rows), f"){arrow}"])


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list}


def fields(node: ast.ClassDef) -> list[str]:
    """The annotated attributes of a dataclass or a named tuple, as they are written."""
    tuples = {"NamedTuple", "typing.NamedTuple"}
    if not decorators(node) & {"dataclass", "dataclasses.dataclass"} and not tuples & set(map(ast.unparse, node.bases)):
        return []
    return [ast.unparse(item) for item in node.body if isinstance(item, ast.AnnAssign)]


def function_text(name: str, function: ast.FunctionDef, level: int, method: bool) -> Iterator[str]:
    yield f"{'#' * level} {escape(name)}\n"
    if not decorators(function) & {"property", "functools.cached_property", "cached_property"}:
        yield f"```python\n{signature(name, function, method)}\n```\n"
    yield markdown(ast.get_docstring(function) or "") + "\n"


def class_text(node: ast.ClassDef) -> Iterator[str]:
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    constructor = next((item for item in methods if item.name == "__init__"), None)
    yield f"## {escape(node.name)}\n"
    if constructor:
        yield f"```python\n{signature(node.name, constructor, method=True, result=False)}\n```\n"
    elif fields(node):
        yield "\n".join(["```python", f"class {node.name}:", *(f"    {field}" for field in fields(node)), "```\n"])
    yield markdown(ast.get_docstring(node) or "") + "\n"
    if constructor and ast.get_docstring(constructor):
        yield markdown(ast.get_docstring(constructor) or "") + "\n"
    for method in methods:
        if not method.name.startswith("_") and ast.get_docstring(method):
            yield from function_text(f"{node.name}.{method.name}", method, 3, method=True)


def python_page(module: str, names: set[str] | None) -> str:
    """The page of one module."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    package, _, last = f"nsa_torch/{module}".replace("/", ".").rpartition(".")
    plain = f"# {package}.{last}" if module in ("reference", "distributed") else f"# {package}: {last}"
    title = "# nsa_torch" if module == "__init__" else plain
    parts = [title + "\n", markdown(ast.get_docstring(tree) or "") + "\n"]
    for node in definitions(tree, names):
        if isinstance(node, ast.ClassDef):
            parts += class_text(node)
        else:
            parts += function_text(node.name, node, 2, method=False)
    return "\n".join(parts)


# --- the C++ header ---


def cpp_page(header: Path) -> str:
    """The page of csrc/nsa.h: each declaration that follows a comment, less the bodies of functions."""
    source = re.sub(r"namespace detail \{.*?\}  // namespace detail\n", "", header.read_text(), flags=re.DOTALL)
    introduction, _, rest = source.partition("#pragma once")
    parts = ["# nsa.h: the C++ interface\n", cpp_comment(introduction) + "\n"]
    pattern = r"^((?://[^\n]*\n)+)((?:template[^\n]*\n)?(?:struct|class|enum|inline) [^\n]*\n(?:[^\n]+\n)*)"
    for comment, code in re.findall(pattern, rest, flags=re.MULTILINE):
        if re.match(r"(struct|class|enum)", code):
            title = re.sub(r"\W.*", "", code.split()[1], flags=re.DOTALL)
            declaration = code.rstrip()
        else:
            declaration = re.sub(r"\s*\{\n.*", ";", code, flags=re.DOTALL).removeprefix("inline ")
            title = re.findall(r"(\w+)\(", declaration)[0]
        parts.append(f"## {escape(title)}\n\n```cpp\n{declaration}\n```\n\n{cpp_comment(comment)}\n")
    return "\n".join(parts)


def cpp_comment(comment: str) -> str:
    lines = re.findall(r"^// ?(.*)$", comment, flags=re.MULTILINE)
    return markdown("\n".join(line[2:] if re.match(r"  \S", line) else line for line in lines))


# --- the whole ---


def index(titles: dict[str, str]) -> str:
    lines = ["# API", "", "Written by `make docs` from the source; change the docstrings, not these pages.", ""]
    for name, page in titles.items():
        heading = page.splitlines()[0].removeprefix("# ")
        entries = re.findall(r"^## (.*)$", page, flags=re.MULTILINE)
        lines.append(f"- [{heading}]({name}): {', '.join(entries)}")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    out = {
        "package.md" if module == "__init__" else f"{module.replace('/', '_')}.md": python_page(module, names)
        for module, names in exported().items()
    }
    out["cpp.md"] = cpp_page(ROOT / "csrc" / "nsa.h")
    out = {name: page.rstrip() + "\n" for name, page in out.items()}
    return {"index.md": index(out), **out}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail when a page is out of date")
    check = parser.parse_args().check
    wanted = pages()
    there = {path.name: path.read_text() for path in TARGET.glob("*.md")}
    stale = sorted(name for name in {*wanted, *there} if wanted.get(name) != there.get(name))
    if check:
        for name in stale:
            print(f"docs/api/{name} is out of date: run `make docs`")
        return 1 if stale else 0
    TARGET.mkdir(exist_ok=True)
    for name in stale:
        if name in wanted:
            (TARGET / name).write_text(wanted[name])
        else:
            (TARGET / name).unlink()
        print(f"docs/api/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
