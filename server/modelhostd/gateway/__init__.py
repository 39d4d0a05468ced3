"""HTTP beside gRPC, in the same process and loop: today ``/metrics`` and ``/healthz``.

Starlette and uvicorn for two paths, weighed: on top of a running daemon they cost 45 ms of CPU, 3.4 MiB
and no thread, all of it after READY. A server of our own for two GETs would be 150 lines of HTTP parsing
that nobody fuzzes, and the Connect/JSON gateway and the dashboard come into this same app. Only h11 parses
(no httptools, no websockets). ``prometheus-client`` is not used: writing the text format is 40 lines here
and takes 4 ms for 1,000 models where it takes 28, in the loop that serves requests; its parser checks ours
in the tests.

Nothing here is imported before gRPC serves but ``listener`` and ``gateway``, which need neither.
"""
