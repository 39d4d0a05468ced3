"""HTTP beside gRPC, in the same process and loop: today ``/metrics`` and ``/healthz``.

Starlette and uvicorn for two paths, weighed: they cost the daemon 65 ms of CPU and 5 MiB, all of it after
READY and in a thread. A server of our own for two GETs would be 150 lines of HTTP parsing that nobody
fuzzes, and the Connect/JSON gateway and the dashboard come into this same app. Only h11 parses (no
httptools, no websockets), and ``http`` bounds what uvicorn leaves open. ``prometheus-client`` is not used:
writing the text format is 40 lines here and takes 4 ms for 6,000 series where it takes 28, in the loop that
serves requests; its parser checks ours in the tests.

Nothing here is imported before gRPC serves but ``gateway``, ``listener`` and ``sources``, which need
neither.
"""
