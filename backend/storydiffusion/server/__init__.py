"""The backend process: the engine behind HTTP and events, for one machine's own programs.

    main.py        the process: token, socket, ready line, `storydiffusion serve`
    parent.py      ends it with the process that started it
    security.py    who may ask: token, Host, Origin, content types, sizes
    app.py         the endpoints and the OpenAPI description
    protocol.py    every JSON object that crosses the wire
    images.py      bytes to pixels and back; the ZIP of a result
    work.py        a request checked and made ready to run
    jobs.py        the queue and its one worker; events.py what it tells
    engine.py      the loaded model; the only module here that makes pictures

Kept here: nothing outside this package knows JSON or HTTP. A request carries everything it needs; what
is remembered (queue, events, results, the loaded model) is never needed by a later request. No path on
this machine is read from a request or written into an answer.
"""
