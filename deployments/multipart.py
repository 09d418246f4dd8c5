"""multipart/form-data: counted while it streams in, kept in memory alone; what was sent is repeated to nobody."""

from collections.abc import AsyncIterator, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from deployments.body import check_size, counted
from pipeline.errors import MalformedBody

MAX_PARTS = 100  # files and fields; further ones would only fill the memory
Part = tuple[str, str | bytes]


class _Form:
    """What the parser tells of a form, part by part. Starlette's own would write large files to the disk."""

    def __init__(self, boundary: bytes) -> None:
        self.parts: list[Part] = []
        self.complete = False
        self._disposition = b""
        self._name, self._value, self._data = bytearray(), bytearray(), bytearray()
        self.parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def _part_begin(self) -> None:
        if len(self.parts) == MAX_PARTS:
            raise MalformedBody(f"The body has more than {MAX_PARTS} parts; send fewer.")
        self._disposition, self._data = b"", bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _part_end(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise MalformedBody("A part of the body has no name; let your HTTP library write the form.")
        try:
            name = options[b"name"].decode()
            self.parts.append((name, bytes(self._data) if b"filename" in options else self._data.decode()))
        except UnicodeDecodeError as error:
            raise MalformedBody("A field of the form is not UTF-8; send it in UTF-8.") from error

    def _end(self) -> None:
        self.complete = True


def is_multipart(headers: Mapping[str, str]) -> bool:
    """Whether a body says that it is multipart/form-data; header names are lower case."""
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_form(headers: Mapping[str, str], chunks: AsyncIterator[bytes], max_bytes: int) -> list[Part]:
    """The parts of a form in their order, each with its name: a field's text, or a file's bytes.

    Raises UnsupportedContentType, BodyTooLarge, MalformedBody.
    """
    check_size(headers, max_bytes)
    _, options = parse_options_header(headers.get("content-type", ""))
    try:
        form = _Form(options.get(b"boundary", b""))
        async for chunk in counted(chunks, max_bytes):
            form.parser.write(chunk)
    except FormParserError as error:
        raise MalformedBody("The body is not multipart/form-data; let your HTTP library write it.") from error
    if not form.complete:
        raise MalformedBody("The body ends before its last boundary; send it whole.")
    return form.parts
