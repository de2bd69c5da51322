"""A web server of the test's own, whose answers are scripted."""

import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def scripted_server(files, answers=()):
    """Serve `files` by path; `answers` are (path, status, headers), each used once. Yields the address and a count."""
    left, asked = list(answers), Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked[self.path] += 1
            scripted = next((one for one in left if one[0] == self.path), None)
            if scripted is not None:
                left.remove(scripted)
            status, headers = scripted[1:] if scripted else (200 if self.path in files else 404, {})
            data = files.get(self.path, b"") if status == 200 else b"no"
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *words):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
