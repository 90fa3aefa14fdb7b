"""What the openai client and wrk see of a server: clients.py ADDRESS RUN FOLDER. Fails on the first thing that is not
as it should be."""

import json
import os
import subprocess
import sys
import threading
import urllib.request

import openai

address, run, folder = sys.argv[1:4]
key = os.environ["OPENAI_API_KEY"]
client = openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0)
PROMPT = "The atomic number of"


def check(what, holds):
    print(f"{'ok    ' if holds else 'FAILED'} {what}", flush=True)
    if not holds:
        sys.exit(1)


def fails(what, error, **options):
    try:
        client.completions.create(**{"model": "anchorage", "prompt": PROMPT, **options})
    except error as found:
        check(f"{what}: {found.status_code} {found.body['message'][:90]}", True)
    else:
        check(what, False)


def call(method, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    head = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(address + path, data, head, method=method)) as answer:
        return answer.read()


check("openai lists the model", client.models.list().data[0].id == "anchorage")
options = {"model": "anchorage", "prompt": PROMPT, "max_tokens": 24, "temperature": 0.8, "seed": 7}
whole = client.completions.create(**options)
chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
check(f"openai streams {len(chunks)} chunks with the text of one answer", text == whole.choices[0].text)
check("openai counts the tokens of a stream", chunks[-1].usage == whole.usage)
scored = client.completions.create(model="anchorage", prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
logprobs = scored.choices[0].logprobs
check("openai scores a prompt", logprobs.token_logprobs[0] is None and all(x <= 0 for x in logprobs.token_logprobs[1:]))
memories = {name: client.completions.create(**options, extra_body={"memory": name}) for name in ("auto", "off", "generic")}
told = {name: answer.model_extra["anchorage"] for name, answer in memories.items()}
check(f"memory auto took the path {told['auto']['path']}", told["auto"]["path"] and told["off"]["path"] is None)
vector = client.embeddings.create(model="anchorage", input=["gold", "silver"]).data[1].embedding
check(f"openai embeds in {len(vector)} dimensions", abs(sum(x * x for x in vector) - 1) < 1e-3)
fails("a temperature below 0", openai.BadRequestError, temperature=-1)
fails("another model", openai.NotFoundError, model="gpt-4")
fails("a prompt that is too long", openai.BadRequestError, prompt="gold " * 100_000)
stranger = openai.OpenAI(base_url=f"{address}/v1", api_key="stranger-key-0123456", max_retries=0)
try:
    stranger.models.list()
except openai.AuthenticationError as error:
    check(f"another key: {error.status_code}", True)
else:
    check("another key", False)

# A bank swapped again and again under load.
newest = sorted(os.listdir(os.path.join(run, "checkpoints")))[-1]
source = os.path.abspath(os.path.join(run, "checkpoints", newest, "memory"))
script = os.path.join(folder, "load.lua")
with open(script, "w") as file:
    body = json.dumps({"model": "anchorage", "prompt": PROMPT, "max_tokens": 8, "temperature": 0})
    file.write(f"wrk.method = 'POST'\nwrk.body = '{body}'\n")
    file.write(f"wrk.headers['Content-Type'] = 'application/json'\nwrk.headers['Authorization'] = 'Bearer {key}'\n")
stop, swaps, failures = threading.Event(), 0, []


def swap():
    global swaps
    while not stop.is_set():
        try:
            call("POST", "/v1/banks", {"name": "default", "source": source})
            swaps += 1
        except Exception as error:  # what went wrong is told below
            failures.append(repr(error))


thread = threading.Thread(target=swap)
thread.start()
wrk = ["wrk", "--threads", "1", "--connections", "8", "--duration", "10s", "--latency", "--script", script]
told = subprocess.run([*wrk, f"{address}/v1/completions"], capture_output=True, text=True, check=True).stdout
stop.set()
thread.join()
print("\n".join("    " + line.strip() for line in told.splitlines()))
check(f"{swaps} swaps of a bank, none failed {failures[:1]}", swaps > 0 and not failures)
check("no request failed while banks were swapped", "Non-2xx" not in told and "Socket errors" not in told)
