"""A process that was forked after JAX has run raises an error instead of waiting forever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHILD = """
import os, sys, warnings
warnings.simplefilter("ignore")  # JAX's own of os.fork
import gptjax
from gptjax.errors import RequestError
lm = gptjax.load()
lm.logits([5])
CALLS = [lambda: lm.generate("Once"), lambda: lm.stream("Once"), lambda: lm.logits([5]), lambda: lm.init_state(),
         lambda: lm.memory(), lambda: gptjax.load(), lambda: lm.__enter__()]
sys.stdout.flush()
if os.fork() == 0:
    for number, call in enumerate(CALLS):
        try:
            call()
            print("call", number, "was made")
        except RequestError as error:
            assert "forked from process" in str(error) and "spawn" in str(error), error
    lm.tokenizer.encode("text needs no JAX")
    print("child done", flush=True)
    os._exit(0)
os.wait()
print("parent", len(lm.generate("Once", max_tokens=2).token_ids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_generating_after_a_fork_is_refused():
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["child done", "parent 2"]
