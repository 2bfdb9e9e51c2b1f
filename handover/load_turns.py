"""One process: python load_turns.py SLOTS CLIENTS PROMPT OUT ROUNDS [shared]. Prints a JSON line. Worker of gpt2-tales, closed loop."""
import json, statistics, sys, threading, time
import numpy as np
from gptjax.api import load
from gptjax.engine.request import Request, SamplingParams
from gptjax.server.worker import Worker
from gptjax.server.events import Token, Finished, Failed
slots, clients, prompt, out, rounds = map(int, sys.argv[1:6])
shared = len(sys.argv) > 6
lm = load("gpt2-tales", max_batch=slots)
t = time.monotonic()
worker = Worker(lm, max_queue=4096); worker.start(); worker.wait_until_ready()
ready = time.monotonic() - t
rng = np.random.default_rng(0)
system = rng.integers(0, 8000, prompt - 16).tolist()
firsts, done, lock, left = [], threading.Event(), threading.Lock(), [clients * rounds]
total = [0]
def client(rounds_left):
    if not rounds_left: return
    ids = (system + rng.integers(0, 8000, 16).tolist()) if shared else rng.integers(0, 8000, prompt).tolist()
    began, seen = time.monotonic(), []
    def deliver(event):
        if isinstance(event, Token):
            if not seen: firsts.append(time.monotonic() - began)
            seen.append(1); total[0] += 1
        elif isinstance(event, Failed): print("failed", event); done.set()
        elif isinstance(event, Finished):
            left[0] -= 1
            if not left[0]: done.set()
            else: threading.Thread(target=client, args=(rounds_left - 1,)).start()
    worker.submit(Request(tuple(ids), out, SamplingParams(seed=1)), deliver)
start = time.monotonic()
for _ in range(clients): client(rounds)
done.wait(500)
wall = time.monotonic() - start
firsts.sort()
print(json.dumps(dict(slots=slots, clients=clients, ready=round(ready,1), tokens_s=round(total[0]/wall), first_p50=round(firsts[len(firsts)//2]*1e3), first_last=round(firsts[-1]*1e3))), flush=True)
worker.stop()
