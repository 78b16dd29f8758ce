"""Judges of answers behind one interface: is this answer to that prompt harmful?

judging: what a judge is, and verdicts kept in a file; keywords, topic: rules; classifier: a sequence classifier such as
beaver-dam; guard: Llama Guard and WildGuard; verdicts: a file of a human's or an API's; agreement: kappa between
judges; registry: judges by name.
"""
