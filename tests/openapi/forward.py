"""Lets a program that speaks TCP use a unix socket.

usage: forward.py SOCKET. Listens at a port of its own on 127.0.0.1, prints it,
and passes every connection on until it is killed.
"""

import socket
import sys
import threading


def copy(source, sink):
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # The other direction has ended the connection.


def serve(client):
    with client, socket.socket(socket.AF_UNIX) as server:
        server.connect(sys.argv[1])
        answers = threading.Thread(target=copy, args=(server, client))
        answers.start()
        copy(client, server)
        answers.join()


listener = socket.create_server(("127.0.0.1", 0), backlog=64)
print(listener.getsockname()[1], flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
