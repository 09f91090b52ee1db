"""Numbers about code style, to watch and not to game.

    python -m experiments.style                     l2d.py, beside what others have
    python -m experiments.style l2d.py train.py     other files

Code lines are the lines with code on them: no docstrings, comments or blank lines. A line's length
is that of the whole line, with indentation. Tokens are Python's own."""

import argparse
import ast
import io
import tokenize
from pathlib import Path

OTHERS = (                          # tokens a line, mean length, over 100 characters, lambdas
    ("nanoGPT model.py", "10.9", "52", "7%", ""),
    ("DiT models.py", "11.1", "48", "1%", ""),
    ("k-diffusion sampling.py", "13.1", "50", "8%", ""),
    ("lucidrains", "8.3", "44", "4%", ""),
    ("l2d, first version", "14.7", "67", "24%", "11"))
LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
          tokenize.ENCODING, tokenize.ENDMARKER}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)

def docstring_lines(tree):
    """The numbers of the lines that docstrings take."""
    lines = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                lines.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines

def measure(file):
    """{name: number} for one file."""
    text = Path(file).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    documented, tokens, code = docstring_lines(tree), 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in LAYOUT and token.start[0] not in documented:
            tokens += 1
            code.update(range(token.start[0], token.end[0] + 1))
    lengths, nodes = [len(lines[number - 1]) for number in code], list(ast.walk(tree))
    def count(*kinds):
        return sum(isinstance(node, kinds) for node in nodes)
    return {"lines": len(lines), "code": len(code), "tokens": tokens / len(code),
            "length": sum(lengths) / len(code),
            "over": sum(length > 100 for length in lengths) / len(code),
            "lambdas": count(ast.Lambda), "conditionals": count(ast.IfExp),
            "comprehensions": count(*COMPREHENSIONS)}

def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["l2d.py"], metavar="FILES")
    args = parser.parse_args()
    form = "{:<30}{:>8}{:>8}{:>10}{:>9}{:>10}{:>9}{:>14}{:>16}"
    print(form.format("", "lines", "code", "tokens/", "mean", "over 100", "lambdas", "conditional",
                      "comprehensions"))
    print(form.format("", "", "lines", "line", "length", "", "", "expressions", ""))
    for file in args.files:
        found = measure(file)
        print(form.format(file[-29:], found["lines"], found["code"], f"{found['tokens']:.1f}",
                          f"{found['length']:.0f}", f"{found['over']:.0%}", found["lambdas"],
                          found["conditionals"], found["comprehensions"]))
    for name, tokens, length, over, lambdas in OTHERS:
        print(form.format(name, "", "", tokens, length, over, lambdas, "", ""))

if __name__ == "__main__":
    main()
