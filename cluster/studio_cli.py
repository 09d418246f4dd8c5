"""`pulid studio`: the web page in front of a service (docs/studio.md)."""

import os
import signal
import socket
import tempfile
from contextlib import suppress
from typing import Annotated

import typer

from cluster.console import told
from cluster.local import check_port
from cluster.remote import HERE, KeyFile, connected
from pipeline.errors import SettingsInvalid

PASSWORD = "PULID_STUDIO__PASSWORD"
OURS = ("127.0.0.1", "::1", "localhost")
STOP_SECONDS = 5  # for visitors' open streams to end


def studio(
    server: Annotated[str, typer.Option(envvar="PULID_STUDIO__SERVER", help="The address of the service.")] = HERE,
    key_file: KeyFile = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 7860,
) -> None:
    """Start the Studio, a web page in front of a service, until Ctrl-C. It needs the extra `studio`.

    Where others than this machine reach it, it asks visitors for the password in PULID_STUDIO__PASSWORD.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn would pass it on before the files are erased
    with told(), connected(server, key_file) as client, suppress(KeyboardInterrupt):
        password = os.environ.get(PASSWORD, "").strip()  # a secret made from a file has the end of its line
        if PASSWORD in os.environ and not password:
            raise SettingsInvalid(f"{PASSWORD} is empty: say a password, or leave the variable out.")
        if host not in OURS and not password:
            raise SettingsInvalid(f"Others can reach {host}: set {PASSWORD}, or let it listen on 127.0.0.1.")
        check_port(host, port)
        with tempfile.TemporaryDirectory(prefix="pulid-studio-") as folder:  # for what visitors send, and no longer
            os.environ.update(GRADIO_TEMP_DIR=folder, GRADIO_ANALYTICS_ENABLED="False")  # read while it is imported
            try:
                import uvicorn

                from studio.app import web
            except ModuleNotFoundError as error:
                raise SettingsInvalid("The Studio needs Gradio: pip install 'pulid-serve[studio]'.") from error
            config = uvicorn.Config(web(client, password), log_level="warning", timeout_graceful_shutdown=STOP_SECONDS)
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with socket.create_server((host, port), family=family) as listener:
                address = f"[{host}]" if ":" in host else host
                print(f"Ready: http://{address}:{port} (Ctrl-C stops it)", flush=True)
                uvicorn.Server(config).run(sockets=[listener])
