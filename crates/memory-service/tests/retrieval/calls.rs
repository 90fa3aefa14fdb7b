//! What each call answers.

use cluster_tree::ClusterId;
use half::bf16;
use memory_bank::{Block, BlockDtype, Encoded};
use memory_service::proto::retrieval::retrieve_request::What;
use memory_service::proto::retrieval::{
    BlockId, BlockIds, Dtype, Embedding, ExplainRequest, InfoRequest, Path, RetrieveRequest, RouteRequest,
};
use memory_service::{RetrievalLimits, RetrievalOptions};
use tonic::Code;

use crate::support::{Echo, Served, retrieve, spec, values};

fn id(level: u8, index: u32) -> ClusterId {
    ClusterId { level, index }
}

fn text(text: &str) -> RetrieveRequest {
    RetrieveRequest { what: Some(What::Text(text.into())), ..RetrieveRequest::default() }
}

fn blocks(ids: &[ClusterId]) -> Option<What> {
    let ids = ids.iter().map(|id| BlockId { level: u32::from(id.level), index: id.index });
    Some(What::Blocks(BlockIds { ids: ids.collect() }))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn texts_and_embeddings_are_routed_in_their_order() {
    let served = Served::start(Echo::default(), RetrievalOptions::default()).await;
    let mut client = served.client();
    let texts = vec!["abcd".to_owned(), "a".to_owned()];
    let found = client.route(RouteRequest { texts: texts.clone(), ..Default::default() }).await.unwrap();
    let inputs = found.into_inner().inputs;
    let leaves = |i: usize| -> Vec<u32> {
        inputs[i].routes.iter().map(|route| route.path.as_ref().unwrap().indices[1]).collect()
    };
    assert_eq!((leaves(0), leaves(1)), (vec![4, 0], vec![1, 0]));
    assert_eq!((inputs[0].routes[0].distance, inputs[0].routes[0].score), (0.25, 0.75));

    let one = client.route(RouteRequest { texts, n: 1, ..Default::default() }).await.unwrap().into_inner();
    assert!(one.inputs.iter().all(|input| input.routes.len() == 1));
    let embeddings = vec![Embedding { values: vec![5.0, 0.125] }];
    let found = client.route(RouteRequest { embeddings, ..Default::default() }).await.unwrap().into_inner();
    assert_eq!(found.inputs[0].routes[0].path.as_ref().unwrap().indices, [1, 5]);

    for (texts, embeddings, expected) in [
        (vec![], vec![], "0 inputs in one request, expected 1 to 1024"),
        (
            vec!["a".to_owned()],
            vec![Embedding::default()],
            "expected texts or embeddings, found 1 texts and 1 embeddings",
        ),
        (vec![], vec![Embedding::default()], "embedding 0: expected 2 numbers, found another"),
    ] {
        let status = client.route(RouteRequest { texts, embeddings, n: 0 }).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::InvalidArgument, expected));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn blocks_come_in_pieces_as_they_are_held_and_in_each_dtype() {
    let served = Served::start(Echo::default(), RetrievalOptions::default()).await;
    let mut client = served.client();
    let (head, found) = retrieve(&mut client, text("abcd")).await.unwrap();
    assert_eq!(
        (head.bank.as_str(), head.step, head.path.clone().unwrap().indices),
        ("default", 290, vec![1, 4])
    );
    assert_eq!(head.spec.as_ref().unwrap().width, [512, 2]);
    assert_eq!(head.blocks[0].shape, [4, 3, 512, 64]);
    assert_eq!((head.dtype(), head.hashes["tree"].as_str()), (Dtype::F32, "a1"));
    for (found, id) in found.iter().zip([id(0, 1), id(1, 4)]) {
        assert!(bytemuck::pod_collect_to_vec::<u8, f32>(found) == values(id), "{id}");
    }

    for (dtype, held) in
        [(Dtype::F32, BlockDtype::F32), (Dtype::Bf16, BlockDtype::Bf16), (Dtype::Int8, BlockDtype::Int8)]
    {
        let ids = [id(1, 5), id(0, ClusterId::GENERIC), id(1, 5)];
        let request = RetrieveRequest {
            what: blocks(&ids),
            dtype: dtype.into(),
            bank: "b".into(),
            ..Default::default()
        };
        let (head, found) = retrieve(&mut client, request).await.unwrap();
        assert_eq!((head.dtype(), head.path, head.bank.as_str()), (dtype, None, "b"));
        for (found, id) in found.iter().zip(ids) {
            let block = Block { id, values: values(id) };
            let expected = Encoded::encode(held, spec().d_model, &block).unwrap();
            assert!(*found == expected.parts().concat(), "{id} as {held}");
        }
    }
    // What bf16 is to a client.
    let request = RetrieveRequest { what: blocks(&[id(1, 0)]), dtype: 2, ..Default::default() };
    let found = retrieve(&mut client, request).await.unwrap().1;
    let first = bf16::from_le_bytes([found[0][2], found[0][3]]);
    assert_eq!(first, bf16::from_f32(values(id(1, 0))[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_is_said_with_what_was_expected() {
    let limits =
        RetrievalLimits { text_bytes: 8, blocks_per_request: 2, request_mib: 2, ..Default::default() };
    let served = Served::start(Echo::default(), RetrievalOptions { limits, ..Default::default() }).await;
    let mut client = served.client();
    let path = |indices: &[u32]| Some(What::Path(Path { indices: indices.to_vec() }));
    let of = |what| RetrieveRequest { what, ..Default::default() };
    let five = [id(1, 0); 5];
    for (request, code, expected) in [
        (text("longer"), Code::FailedPrecondition, "path of \"longer\" is blocked"),
        (text("longer still"), Code::InvalidArgument, "text 0 of 12 bytes, expected at most 8"),
        (of(None), Code::InvalidArgument, "expected a text, a path or blocks, found none of them"),
        (of(path(&[])), Code::InvalidArgument, "a cluster tree has 1 to 255 levels, found 0"),
        (of(blocks(&five)), Code::InvalidArgument, "5 blocks in one request, expected 1 to 2"),
        (
            RetrieveRequest { dtype: 7, ..text("a") },
            Code::InvalidArgument,
            "dtype 7, expected 0 (as held), 1 (f32), 2 (bf16) or 3 (int8)",
        ),
        (
            RetrieveRequest { levels: vec![0], ..of(blocks(&five[..1])) },
            Code::InvalidArgument,
            "levels and blocked: expected none beside blocks, found some",
        ),
        (
            of(blocks(&[id(0, 0), id(0, 1)])),
            Code::InvalidArgument,
            "3 MiB of blocks in one request, expected at most 2",
        ),
        (
            of(Some(What::Blocks(BlockIds { ids: vec![BlockId { level: 256, index: 0 }] }))),
            Code::InvalidArgument,
            "level 256 of a block, expected 0 to 255",
        ),
    ] {
        let status = retrieve(&mut client, request).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (code, expected));
    }
    // As bf16 they fit.
    let halves = RetrieveRequest { dtype: 2, ..of(blocks(&[id(0, 0), id(0, 1)])) };
    assert_eq!(retrieve(&mut client, halves).await.unwrap().1.len(), 2);
    let status = client.explain(ExplainRequest { prefix: vec![9] }).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let found = client.explain(ExplainRequest { prefix: vec![1] }).await.unwrap().into_inner();
    assert_eq!(found.cluster.unwrap().path, "[1]");
    let info = client.info(InfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.tree.as_str(), info.embedding_dim), ("a1", 2));
}
