"""Lists the requests of a HAR file that were answered 500.

usage: failures.py HAR. Each is told once; there should be none.
"""

import json
import sys

failures = {}
with open(sys.argv[1], encoding="utf-8") as file:
    for entry in json.load(file)["log"]["entries"]:
        request, response = entry["request"], entry["response"]
        if response["status"] != 500:
            continue
        answer = response.get("content", {}).get("text", "")
        sent = request.get("postData", {}).get("text", "")
        failures.setdefault((request["method"], request["url"], answer), sent)

for (method, url, answer), sent in failures.items():
    print(f"openapi: {method} {url} failed: {answer}\n    after {sent[:300]}")
sys.exit(1 if failures else 0)
