//! Whether a store keeps what conditional writes promise. Some do not: they answer "done" to a create
//! of what is there, or to several creates at once.

use bytes::Bytes;
use futures::future::join_all;

use crate::files::{Files, Updated};
use crate::{Error, Result};

/// Creates of one name at the same time.
const RACERS: usize = 16;

/// Tries the store out with two small files, and removes them. Fails on a store that does not create a
/// file once only, or that updates one by the tag of an older content.
pub(crate) async fn probe(files: &Files, unique: &str) -> Result<()> {
    let names = ["once", "race"].map(|what| format!("probe-{unique}-{what}"));
    let found = try_out(files, &names).await;
    for name in &names {
        let removed = files.remove(name).await;
        if found.is_ok() {
            removed?;
        }
    }
    found
}

async fn try_out(files: &Files, [once, race]: &[String; 2]) -> Result<()> {
    let lies = |did: String, expected| Error::UnfitStore { place: files.place(""), did, expected };
    let refuse = "refuse it: its conditional writes cannot be relied on";
    if !files.create(once, Bytes::from_static(b"first")).await? {
        return Err(lies(format!("says that the new name {once} is taken"), "create it"));
    }
    if files.create(once, Bytes::from_static(b"second")).await? {
        return Err(lies("created a file that was there already".to_owned(), refuse));
    }
    match files.update_stale(once).await? {
        Updated::Refused => {}
        Updated::Done => {
            return Err(lies("updated a file by the tag of its older content".to_owned(), refuse));
        }
    }
    let contents: Vec<Bytes> = (0..RACERS).map(|racer| format!("racer {racer}").into()).collect();
    let answers = join_all(contents.iter().map(|content| files.create(race, content.clone()))).await;
    let answers = answers.into_iter().collect::<Result<Vec<bool>>>()?;
    let winners: Vec<&Bytes> = contents.iter().zip(answers).filter(|(_, won)| *won).map(|(c, _)| c).collect();
    let expected = "have one winner, whose content is there";
    if winners.len() != 1 {
        return Err(lies(format!("let {} of {RACERS} create one file", winners.len()), expected));
    }
    let found = files.read_small(race, 1 << 10).await?;
    if found != winners[0] {
        let did = format!("has {found:?} where it said that {:?} was created", winners[0]);
        return Err(lies(did, expected));
    }
    Ok(())
}
