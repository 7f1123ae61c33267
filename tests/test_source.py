"""A scan of the modules for calls that run or unpickle what they read."""

import ast

from conftest import ROOT

FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "marshal.load", "marshal.loads",
             "pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "shelve.open",
             "torch.distributed.checkpoint.FileSystemReader"}  # its metadata is a pickle


def test_no_placeholder_is_left_in_a_text():
    texts = [path for kind in ("*.md", "*.py", "*/*.md", "*/*.py", "*/*.ipynb") for path in ROOT.glob(kind)]
    assert len(texts) > 70 and not [path for path in texts if "@" + "@" in path.read_text(encoding="utf-8")]


def dangerous(source):
    """The calls in Python source that could run or unpickle what they are given."""
    tree, found = ast.parse(source), []
    names = {alias.asname or alias.name: f"{getattr(node, 'module', '')}.{alias.name}".strip(".")
             for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        first, dot, rest = ast.unparse(call.func).partition(".")
        name = names.get(first, first) + dot + rest
        given = {keyword.arg: getattr(keyword.value, "value", "unknown") for keyword in call.keywords}
        line = name.startswith("subprocess.") and isinstance(call.args[0], (ast.Constant, ast.JoinedStr, ast.BinOp))
        if (line or name in FORBIDDEN or any(given.get(key) for key in ("allow_pickle", "trust_remote_code", "shell"))
                or (name == "torch.load" and given.get("weights_only") is not True)
                or (name.endswith((".from_pretrained", ".from_config")) and given.get("trust_remote_code") is not False)):
            found.append(f"line {call.lineno}: {name}")
    return found


def test_no_module_unpickles_or_runs_what_it_reads():
    for line in ("import pickle as p; p.loads(x)", "from pickle import load; load(f)", "torch.load(f, weights_only=yes)",
                 "numpy.load(f, allow_pickle=True)", "eval(x)", "compile(x)", "AutoModel.from_pretrained(x)", "os.system(x)",
                 "f(trust_remote_code=yes)", "subprocess.run(x, shell=True)", "from subprocess import run; run(f'ls {x}')"):
        assert dangerous(line), line
    assert not dangerous("re.compile(x); model.eval(); pickle.UnpicklingError(x); subprocess.run([x]); json.load(f)")
    modules = sorted([*ROOT.glob("*.py"), *ROOT.glob("plumbing/*.py"), *ROOT.glob("tools/*.py")])
    assert len(modules) > 20 and {path.name: found for path in modules if (found := dangerous(path.read_text()))} == {}
