"""The HTTP server, in two processes: one owns the engine, the other speaks HTTP and does not import JAX.

worker/      the engine's process
front/       the process that speaks HTTP: start there, with app.py, which has all routes
openai/      the routes of OpenAI's API
anthropic/   those of Anthropic's
generation/  what these share: from a request's fields through the worker and back as text
http/        HTTP without a model: bodies, events, connections, metrics
ipc/         what the two processes say to each other
"""
