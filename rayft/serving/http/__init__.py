"""What a client sees: routes, keys, bodies, answers and streams, in the form of OpenAI's interface."""
