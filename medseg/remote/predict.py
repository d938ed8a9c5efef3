"""`medseg predict` with `--from`, `--to` or `--engine`: the ordinary prediction, with other ends or other hands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from rich.console import Console

from medseg.data.dicom_tree import MODALITIES
from medseg.data.layouts import Case
from medseg.errors import Code, MedsegError, nearest
from medseg.formats.dicom.export import Form
from medseg.inference.ensemble import Ensemble
from medseg.inference.exchange import HERE, Exchange
from medseg.inference.folder import Engine, Outcome, export_of, in_this_process, predict_cases, predict_inputs
from medseg.inference.job import Job, Options, say
from medseg.inference.manifest import has_begun
from medseg.remote.dicomweb import DicomWebSink, DicomWebSource
from medseg.remote.exchange import Remote, Sink, Source
from medseg.remote.storage import StorageSink, StorageSource

Place = tuple[str, str]
"""Kind and URL, as `--from` and `--to` take them."""
DICOMWEB, STORAGE = "dicomweb", "storage"
"""The kinds: DICOM archives by URL, and object stores (s3://, …)."""
DRAWN = (Form.DICOM_SEG, Form.RTSTRUCT)


def predict_remote(
    ensemble: Ensemble,
    inputs: Sequence[Path],
    output: Path,
    console: Console,
    options: Options,
    *,
    source: Place | None = None,
    sink: Place | None = None,
    query: Mapping[str, str] | None = None,
    engine: Engine = in_this_process,
) -> Outcome:
    """Predict scans that lie elsewhere, deliver label files elsewhere, or have others do the work.

    Args:
        ensemble: the loaded models.
        inputs: scans on this disk; none where there is a source.
        output: folder of the manifest, of tables, and of the files that are not delivered.
        console: where the user reads.
        options: what is written, and how.
        source: where scans are fetched from.
        sink: where label files are delivered to.
        query: DICOM keyword → value, of an archive's series.
        engine: who works.
    Raises:
        MedsegError: as `predict_inputs`; E_CONFIG for a place that is none, and for options that do not go together;
            E_CHANNELS for a model of several channels, which a series is not; E_ARCHIVE.
    """
    _check(inputs, options, source, sink, query)
    origin = _source(ensemble, options, source, query or {}) if source is not None else None
    target = _sink(sink, source) if sink is not None else None
    if isinstance(origin, StorageSource) and isinstance(target, StorageSink) and origin.store.holds(target.store):
        raise MedsegError(
            Code.CONFIG,
            "the labels would lie among the scans, and be taken for scans the next time",
            where="--to",
            remedy="give them a folder of their own",
        )
    exchange: AbstractContextManager[Exchange] = Remote(origin, target) if origin or target else nullcontext(HERE)
    for end in (origin, target):
        if isinstance(end, (DicomWebSource, DicomWebSink)) and end.server.is_readable_on_the_way:
            say(console, [f"{end.server.name}: http:// is not encrypted: scans and credentials can be read on the way"])
    with exchange as ends, _ending(target, engine, output, console) as work:
        if target is not None:
            target.begin(may_replace=options.overwrite or (options.resume and has_begun(output)))
        if origin is None:
            return predict_inputs(ensemble, inputs, output, console, options, exchange=ends, engine=work)
        export_of(ensemble, options).check(())
        with console.status("asking where the scans are"):
            cases = origin.cases()
        console.print(f"{len(cases)} scans to look at", highlight=False, markup=False)
        return predict_cases(ensemble, cases, output, console, options, exchange=ends, engine=work)


@contextmanager
def _ending(sink: Sink | None, engine: Engine, output: Path, console: Console) -> Iterator[Engine]:
    """The engine; when it has begun, the sink is told of the end, and never instead of why it came."""
    has_started = False

    def noted(job: Job, cases: Sequence[Case]) -> None:
        nonlocal has_started
        has_started = True
        engine(job, cases)

    try:
        yield noted
    except BaseException:
        if sink is not None and has_started:
            try:
                sink.end(output)
            except MedsegError as error:
                say(console, [f"the tables were not delivered: {error.message}"])
        raise
    if sink is not None and has_started:
        sink.end(output)


def _sink(place: Place, source: Place | None) -> Sink:
    if place[0] == STORAGE:
        return StorageSink(place[1])
    return DicomWebSink(place[1], source[1] if source is not None and source[0] == DICOMWEB else None)


def _source(ensemble: Ensemble, options: Options, place: Place, query: Mapping[str, str]) -> Source:
    if place[0] == STORAGE:
        return StorageSource(place[1], tuple(ensemble.info.channels), options.reading)
    num_channels = ensemble.info.plan.num_channels
    if num_channels != 1:
        raise MedsegError(
            Code.CHANNELS,
            "each series of an archive is one scan, and the model wants several channels",
            where="--from",
            expected="a model of one channel",
            got=f"{num_channels} channels: {', '.join(ensemble.info.channels)}",
            remedy="fetch the series that belong together into a folder for each case, and give that folder",
        )
    series = {"SeriesInstanceUID": options.reading.series} if options.reading.series else {}
    modality = ensemble.info.modality
    return DicomWebSource(place[1], {**query, **series}, modality and MODALITIES.get(modality.upper(), modality))


def _check(
    inputs: Sequence[Path],
    options: Options,
    source: Place | None,
    sink: Place | None,
    query: Mapping[str, str] | None,
) -> None:
    if bool(inputs) == (source is not None):
        raise MedsegError(
            Code.CONFIG,
            "scans are named twice" if inputs else "nothing to predict is named",
            expected="inputs on this disk, or --from with an archive",
            remedy="name one of them",
        )
    if query and (source is None or source[0] != DICOMWEB):
        raise MedsegError(
            Code.CONFIG,
            "a query is answered by an archive",
            where="--query",
            expected="--from dicomweb URL",
            remedy="leave it out, or choose among DICOM series of a folder with --series",
        )
    if sink is not None and sink[0] == DICOMWEB and not set(options.forms) & set(DRAWN):
        raise MedsegError(
            Code.CONFIG,
            "a DICOM archive takes DICOM only",
            where="--format",
            expected=" or ".join(DRAWN),
            got=", ".join(options.forms),
            remedy=f"--format {Form.DICOM_SEG}",
        )
    _check_query(query or {})


def _check_query(query: Mapping[str, str]) -> None:
    from pydicom.datadict import keyword_dict, tag_for_keyword

    for keyword in query:
        if tag_for_keyword(keyword) is None:
            raise MedsegError(
                Code.NAME,
                "DICOM has no such attribute",
                where="--query",
                got=keyword,
                remedy=nearest(keyword, keyword_dict),
            )


def query_of(texts: Sequence[str]) -> dict[str, str]:
    """KEYWORD=VALUE, as `--query` takes them.

    Raises:
        MedsegError: E_CONFIG.
    """
    query: dict[str, str] = {}
    for text in texts:
        keyword, equals, value = text.partition("=")
        if not equals or not keyword.strip():
            raise MedsegError(
                Code.CONFIG,
                "this is no query",
                where="--query",
                expected="KEYWORD=VALUE, such as Modality=CT or StudyDate=20260101-20260331",
                remedy="repeat --query for several",
            )
        query[keyword.strip()] = value.strip()
    return query
