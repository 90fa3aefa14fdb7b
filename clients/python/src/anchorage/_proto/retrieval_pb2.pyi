from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_F32: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]
DTYPE_UNSPECIFIED: Dtype
DTYPE_F32: Dtype
DTYPE_BF16: Dtype
DTYPE_INT8: Dtype

class Path(_message.Message):
    __slots__ = ("indices",)
    INDICES_FIELD_NUMBER: _ClassVar[int]
    indices: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, indices: _Optional[_Iterable[int]] = ...) -> None: ...

class Embedding(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, values: _Optional[_Iterable[float]] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("texts", "embeddings", "n")
    TEXTS_FIELD_NUMBER: _ClassVar[int]
    EMBEDDINGS_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    texts: _containers.RepeatedScalarFieldContainer[str]
    embeddings: _containers.RepeatedCompositeFieldContainer[Embedding]
    n: int
    def __init__(self, texts: _Optional[_Iterable[str]] = ..., embeddings: _Optional[_Iterable[_Union[Embedding, _Mapping]]] = ..., n: _Optional[int] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("inputs",)
    INPUTS_FIELD_NUMBER: _ClassVar[int]
    inputs: _containers.RepeatedCompositeFieldContainer[Routes]
    def __init__(self, inputs: _Optional[_Iterable[_Union[Routes, _Mapping]]] = ...) -> None: ...

class Routes(_message.Message):
    __slots__ = ("routes",)
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    routes: _containers.RepeatedCompositeFieldContainer[Route]
    def __init__(self, routes: _Optional[_Iterable[_Union[Route, _Mapping]]] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("path", "distance", "score")
    PATH_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    path: Path
    distance: float
    score: float
    def __init__(self, path: _Optional[_Union[Path, _Mapping]] = ..., distance: _Optional[float] = ..., score: _Optional[float] = ...) -> None: ...

class BlockId(_message.Message):
    __slots__ = ("level", "index")
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    level: int
    index: int
    def __init__(self, level: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class BlockIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedCompositeFieldContainer[BlockId]
    def __init__(self, ids: _Optional[_Iterable[_Union[BlockId, _Mapping]]] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("bank", "text", "path", "blocks", "dtype", "levels", "blocked")
    BANK_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LEVELS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    bank: str
    text: str
    path: Path
    blocks: BlockIds
    dtype: Dtype
    levels: _containers.RepeatedScalarFieldContainer[int]
    blocked: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, bank: _Optional[str] = ..., text: _Optional[str] = ..., path: _Optional[_Union[Path, _Mapping]] = ..., blocks: _Optional[_Union[BlockIds, _Mapping]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., levels: _Optional[_Iterable[int]] = ..., blocked: _Optional[_Iterable[str]] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("head", "piece")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    PIECE_FIELD_NUMBER: _ClassVar[int]
    head: RetrieveHead
    piece: RetrievePiece
    def __init__(self, head: _Optional[_Union[RetrieveHead, _Mapping]] = ..., piece: _Optional[_Union[RetrievePiece, _Mapping]] = ...) -> None: ...

class RetrieveHead(_message.Message):
    __slots__ = ("bank", "step", "spec", "path", "dtype", "blocks", "blocked", "hashes")
    class HashesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    BANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SPEC_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    bank: str
    step: int
    spec: Spec
    path: Path
    dtype: Dtype
    blocks: _containers.RepeatedCompositeFieldContainer[BlockHead]
    blocked: _containers.RepeatedScalarFieldContainer[str]
    hashes: _containers.ScalarMap[str, str]
    def __init__(self, bank: _Optional[str] = ..., step: _Optional[int] = ..., spec: _Optional[_Union[Spec, _Mapping]] = ..., path: _Optional[_Union[Path, _Mapping]] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., blocks: _Optional[_Iterable[_Union[BlockHead, _Mapping]]] = ..., blocked: _Optional[_Iterable[str]] = ..., hashes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class BlockHead(_message.Message):
    __slots__ = ("id", "shape", "bytes")
    ID_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    id: BlockId
    shape: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    def __init__(self, id: _Optional[_Union[BlockId, _Mapping]] = ..., shape: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ...) -> None: ...

class RetrievePiece(_message.Message):
    __slots__ = ("block", "offset", "payload")
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    block: int
    offset: int
    payload: bytes
    def __init__(self, block: _Optional[int] = ..., offset: _Optional[int] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Spec(_message.Message):
    __slots__ = ("n_layers", "d_model", "width", "branching", "kind", "layers")
    N_LAYERS_FIELD_NUMBER: _ClassVar[int]
    D_MODEL_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    BRANCHING_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    n_layers: int
    d_model: int
    width: _containers.RepeatedScalarFieldContainer[int]
    branching: _containers.RepeatedScalarFieldContainer[int]
    kind: str
    layers: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, n_layers: _Optional[int] = ..., d_model: _Optional[int] = ..., width: _Optional[_Iterable[int]] = ..., branching: _Optional[_Iterable[int]] = ..., kind: _Optional[str] = ..., layers: _Optional[_Iterable[int]] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("prefix",)
    PREFIX_FIELD_NUMBER: _ClassVar[int]
    prefix: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, prefix: _Optional[_Iterable[int]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("cluster", "examples", "children")
    CLUSTER_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    cluster: Cluster
    examples: _containers.RepeatedCompositeFieldContainer[Example]
    children: _containers.RepeatedCompositeFieldContainer[Cluster]
    def __init__(self, cluster: _Optional[_Union[Cluster, _Mapping]] = ..., examples: _Optional[_Iterable[_Union[Example, _Mapping]]] = ..., children: _Optional[_Iterable[_Union[Cluster, _Mapping]]] = ...) -> None: ...

class Cluster(_message.Message):
    __slots__ = ("path", "level", "n_windows", "share", "terms", "updates", "fetches")
    PATH_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    N_WINDOWS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    FETCHES_FIELD_NUMBER: _ClassVar[int]
    path: str
    level: int
    n_windows: int
    share: float
    terms: _containers.RepeatedCompositeFieldContainer[Term]
    updates: int
    fetches: int
    def __init__(self, path: _Optional[str] = ..., level: _Optional[int] = ..., n_windows: _Optional[int] = ..., share: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[Term, _Mapping]]] = ..., updates: _Optional[int] = ..., fetches: _Optional[int] = ...) -> None: ...

class Term(_message.Message):
    __slots__ = ("term", "weight")
    TERM_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    term: str
    weight: float
    def __init__(self, term: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Example(_message.Message):
    __slots__ = ("title", "text", "distance")
    TITLE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    DISTANCE_FIELD_NUMBER: _ClassVar[int]
    title: str
    text: str
    distance: float
    def __init__(self, title: _Optional[str] = ..., text: _Optional[str] = ..., distance: _Optional[float] = ...) -> None: ...

class InfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class InfoResponse(_message.Message):
    __slots__ = ("spec", "tree", "embedding_dim", "banks", "hashes")
    class HashesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SPEC_FIELD_NUMBER: _ClassVar[int]
    TREE_FIELD_NUMBER: _ClassVar[int]
    EMBEDDING_DIM_FIELD_NUMBER: _ClassVar[int]
    BANKS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    spec: Spec
    tree: str
    embedding_dim: int
    banks: _containers.RepeatedCompositeFieldContainer[Bank]
    hashes: _containers.ScalarMap[str, str]
    def __init__(self, spec: _Optional[_Union[Spec, _Mapping]] = ..., tree: _Optional[str] = ..., embedding_dim: _Optional[int] = ..., banks: _Optional[_Iterable[_Union[Bank, _Mapping]]] = ..., hashes: _Optional[_Mapping[str, str]] = ...) -> None: ...

class Bank(_message.Message):
    __slots__ = ("name", "step", "source", "dtype", "n_parameters", "hashes")
    class HashesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    N_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    HASHES_FIELD_NUMBER: _ClassVar[int]
    name: str
    step: int
    source: str
    dtype: Dtype
    n_parameters: int
    hashes: _containers.ScalarMap[str, str]
    def __init__(self, name: _Optional[str] = ..., step: _Optional[int] = ..., source: _Optional[str] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., n_parameters: _Optional[int] = ..., hashes: _Optional[_Mapping[str, str]] = ...) -> None: ...
