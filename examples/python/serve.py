"""Start a server and ask it, as any client of OpenAI's API would."""

import json
import subprocess
import sys
from urllib.request import urlopen

command = [sys.executable, "-m", "bitgen", "serve", "-m", "tiny", "--port", "0"]
server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
url = next(line.split()[-1] for line in server.stderr if " on http://" in line)
asked = json.dumps({"prompt": "And God said", "max_tokens": 16, "temperature": 0}).encode()
print(json.load(urlopen(f"{url}/v1/completions", asked))["choices"][0]["text"])
server.terminate()
server.wait()
