"""The Studio: a web page in front of a service, which it uses as any other client does. docs/studio.md."""
