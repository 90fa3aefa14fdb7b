//! Which path a text gets, what blocking does to it, and what a cluster is said to be.

use std::sync::Arc;

use cluster_tree::ClusterPath;
use eval::tree_page::{ClusterRow, Snippet, TreePage};
use retrieve::{Beam, Retriever};
use serve::memory::{
    Ask, Banks, Blocked, Error, Memory, MemoryOptions, Reach, Retrieval, RetrievalParts, Selected,
};

use crate::made_up::{folder, id, identity, save, tree};
use crate::reader::{Numbers, retrieval};

fn path(text: &str) -> ClusterPath {
    ClusterPath::parse(text, 2).unwrap()
}

fn ask(memory: Memory, text: &str, blocked: &[&str]) -> Ask {
    let blocked = Arc::new(Blocked::new(&tree(), blocked).unwrap());
    Ask { bank: None, text: text.to_owned(), memory, blocked }
}

async fn select(served: &Retrieval, memory: Memory, text: &str, blocked: &[&str]) -> Selected {
    served.select(ask(memory, text, blocked)).await.unwrap()
}

#[tokio::test]
async fn a_text_gets_the_blocks_of_its_path_and_a_second_one_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 3, &[id(0, 0), id(1, 2)]).await;
    let served = retrieval(MemoryOptions::default());
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();

    let first = select(&served, Memory::Auto, "1 0.09", &[]).await;
    assert_eq!(first.path, Some(path("0/2")));
    assert_eq!(
        first.memory.blocks().iter().map(|block| block.id()).collect::<Vec<_>>(),
        [id(0, 0), id(1, 2)]
    );
    assert!(first.cached.iter().all(|level| !level.cached), "{:?}", first.cached);
    assert_eq!(first.bank_version.unwrap().0, 3);
    let second = select(&served, Memory::Path(path("0/2")), "", &[]).await;
    assert!(second.cached.iter().all(|level| level.cached), "{:?}", second.cached);
    for (a, b) in first.memory.blocks().iter().zip(second.memory.blocks()) {
        assert!(Arc::ptr_eq(a, b), "a block was copied");
    }
    assert_eq!(served.fetches(), [vec![2, 0], vec![0, 0, 2, 0, 0, 0]]);

    let off = select(&served, Memory::Off, "1 0", &[]).await;
    assert!(off.memory.blocks().is_empty() && off.path.is_none() && off.bank.is_none());
    let generic = select(&served, Memory::Generic, "", &[]).await;
    assert!(generic.path.unwrap().is_generic());
}

#[tokio::test]
async fn routes_are_best_first_with_their_cosine() {
    let served = retrieval(MemoryOptions::default());
    let routes = served.route(vec!["1 0.09".to_owned(), "-1 0".to_owned()]).await.unwrap();
    assert_eq!(routes[0].iter().map(|route| route.path.to_string()).collect::<Vec<_>>(), ["0/2", "0/1"]);
    assert!((routes[0][0].distance - 1e-4).abs() < 1e-6, "{:?}", routes[0]);
    // Of (1, 0.09) and (1, 0.1): 1.009 over the root of 1.0081 · 1.01.
    assert!((routes[0][0].score - 1.009 / (1.0081f32 * 1.01).sqrt()).abs() < 1e-6, "{:?}", routes[0]);
    assert_eq!(routes[1][0].path, path("1/4"));
    assert_eq!(served.route_embeddings(vec![vec![1.0, 0.09], vec![-1.0, 0.0]]).await.unwrap(), routes);
    assert_eq!(served.embed(vec!["0.5 2".to_owned()]).await.unwrap(), [[0.5, 2.0]]);
    let error = served.route_embeddings(vec![vec![1.0]]).await.unwrap_err();
    assert_eq!(error.to_string(), "embedding 0: expected 2 numbers, found 1");
    let error = served.route(vec![" ".to_owned()]).await.unwrap_err();
    assert_eq!(error.to_string(), "text 0 is empty, expected something to route by");
}

#[tokio::test]
async fn what_is_blocked_is_passed_over_and_told() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 1, &[id(0, 0)]).await;
    let served = retrieval(MemoryOptions::default());
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
    for (blocked, expected, passed) in [
        // The next candidate of the router.
        (&["0/2"][..], Some("0/1"), &["0/2"][..]),
        // Both of its candidates: a wider descent.
        (&["0/2", "0/1"], Some("0/0"), &["0/2", "0/1"]),
        // The whole branch: the nearest leaf elsewhere, which is not the empty one.
        (&["0"], Some("1/4"), &["0"]),
        (&["0", "1/4"], Some("1/3"), &["0", "1/4"]),
        // Everything, with a generic path that was never trained.
        (&["0", "1"], None, &["0", "1"]),
    ] {
        let selected = select(&served, Memory::Auto, "1 0.09", blocked).await;
        assert_eq!(selected.path, expected.map(path), "{blocked:?}");
        assert_eq!(selected.blocked, passed, "{blocked:?}");
        assert_eq!(selected.bank.is_some(), expected.is_some());
    }
    let error = served.select(ask(Memory::Path(path("0/2")), "", &["0"])).await.err().unwrap();
    assert_eq!(error.to_string(), "path 0/2 is blocked by 0: expected one that is not");
    let error = Blocked::new(&tree(), &["1/2"]).unwrap_err();
    assert_eq!(error.to_string(), "no cluster 1/2: expected 0/2");
    let error = served.select(ask(Memory::Path(path("1/2")), "", &[])).await.err().unwrap();
    assert!(matches!(error, Error::UnknownPath { .. }), "{error}");
}

#[tokio::test]
async fn a_trained_generic_path_is_left_when_all_is_blocked() {
    let dir = tempfile::tempdir().unwrap();
    let generic = id(0, cluster_tree::ClusterId::GENERIC);
    let bank = save(dir.path(), &identity(), 1, &[generic]).await;
    let served = retrieval(MemoryOptions::default());
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
    let selected = select(&served, Memory::Auto, "1 0", &["0", "1"]).await;
    assert!(selected.path.unwrap().is_generic());
    assert_eq!(selected.blocked, ["0", "1"]);
}

#[tokio::test]
async fn clusters_are_explained_with_and_without_the_corpus() {
    let dir = tempfile::tempdir().unwrap();
    let bank = save(dir.path(), &identity(), 3, &[id(0, 0), id(1, 1)]).await;
    let row = |i, t: &[u32]| ClusterRow { i, n: 10, t: t.to_vec(), ..ClusterRow::default() };
    let snippet = Snippet { doc: 4, label: None, distance: 0.5, text: "A star.".into() };
    let leaf = ClusterRow { near: vec![snippet], ..row(1, &[1, 0]) };
    let page = TreePage {
        branching: vec![2, 3],
        words: vec!["moon".into(), "star".into()],
        clusters: vec![vec![row(0, &[0]), row(1, &[])], vec![row(0, &[]), leaf]],
        ..TreePage::default()
    };
    let retriever = Retriever::new(Box::new(Numbers), Box::new(Beam::new(tree(), 2).unwrap())).unwrap();
    let (options, reach) = (MemoryOptions::default(), Reach::default());
    let parts =
        RetrievalParts { retriever, tree: tree(), identity: identity(), page: Some(page), reach, options };
    let served = Retrieval::new(parts).unwrap();
    served.banks().load(Banks::DEFAULT, folder(&bank)).await.unwrap();
    select(&served, Memory::Path(path("0/1")), "", &[]).await;

    let leaf = served.explain(&[0, 1]).unwrap();
    assert_eq!((leaf.cluster.path.as_str(), leaf.cluster.level, leaf.cluster.n_windows), ("0/1", 2, 10));
    assert_eq!((leaf.cluster.share, leaf.cluster.updates, leaf.cluster.fetches), (0.2, Some(3), 1));
    let terms: Vec<(&str, f64)> = leaf.cluster.terms.iter().map(|t| (t.term.as_str(), t.weight)).collect();
    assert_eq!(terms, [("star", 1.0), ("moon", 0.5)]);
    assert_eq!((leaf.examples[0].title.as_str(), leaf.examples[0].text.as_str()), ("document 4", "A star."));
    assert!(leaf.children.is_empty());
    let root = served.explain(&[]).unwrap();
    assert_eq!((root.cluster.n_windows, root.children.len(), root.children[1].updates), (50, 2, Some(0)));
    let error = served.explain(&[0, 4]).unwrap_err();
    assert_eq!(error.to_string(), "no cluster 0/4: expected 1/4");

    let plain = retrieval(MemoryOptions::default());
    let second = plain.explain(&[1]).unwrap();
    assert_eq!((second.cluster.n_windows, second.cluster.updates), (20, None));
    // The empty leaf is not shown.
    assert_eq!(second.children.iter().map(|c| c.path.as_str()).collect::<Vec<_>>(), ["1/3", "1/4"]);
}
