"""A face photo and a prompt go in, a picture of that person comes out.

request -> faces -> identity -> text -> denoise -> store; docs/architecture.md has the life of one request.
"""
