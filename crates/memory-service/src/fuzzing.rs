//! What must hold of what arrives over the wire, whatever bytes they are. For fuzzers and tests alone:
//! every function panics when something does not hold, and returns whether it takes the bytes.

use std::fmt::Debug;
use std::net::{Ipv4Addr, SocketAddr};

use bytes::{Buf, Bytes};
use cluster_tree::ClusterId;
pub use memory_bank::fuzzing::Target;
use memory_bank::fuzzing::is_line;
use prost::Message;
use tonic::Code;

use crate::bulk::{
    ENTRY_BYTES, HEAD_BYTES, Head, Kind, MAX_TEXT, REPLY_BYTES, Reply, VERSION_BYTES, decode_entries,
    decode_versions, encode_entry, encode_versions,
};
use crate::codec::{Decode, Encode, FetchPiece, Payload, PieceHead, PushPiece, block_id, cluster_id};
use crate::parts::Parts;
use crate::proto::{self, BlockId};
use crate::security::{BankName, Caller, Identity, Permission, Role, Token, Tokens};
use crate::wire::Dtype;

/// The messages as prost has them.
mod plain {
    #![allow(
        missing_docs,
        unreachable_pub,
        dead_code,
        reason = "generated; documented in proto/memory.proto"
    )]
    #![allow(clippy::all, clippy::pedantic, reason = "generated")]

    include!(concat!(env!("OUT_DIR"), "/plain/memory.v1.rs"));
}

/// What our own decoders refuse and prost takes: it cuts such a number to its lower bits.
const STRICTER: [&str; 2] = ["level is above 255", "block is above 32 bits"];

/// A token of the server that [`role`] asks.
const TOKEN: &str = "0123456789abcdef";

/// All of this module.
pub fn targets() -> Vec<Target> {
    let tokens = format!("read = [\"{TOKEN}\"]\nwrite = [\"fedcba9876543210\"]\n");
    let certificate = include_bytes!("../fuzz/worker.der").to_vec();
    let role_seeds = vec![
        certificate,
        tokens.into_bytes(),
        format!("Bearer {TOKEN}").into_bytes(),
        b"worker".to_vec(),
        b"facts-2.1_b".to_vec(),
    ];
    vec![
        Target { name: "fetch_piece", check: fetch_piece, seeds: fetch_pieces() },
        Target { name: "piece_head", check: piece_head, seeds: piece_heads() },
        Target { name: "push_piece", check: push_piece, seeds: push_pieces() },
        Target { name: "bulk_request", check: bulk_request, seeds: bulk_requests() },
        Target { name: "bulk_reply", check: bulk_reply, seeds: bulk_replies() },
        Target { name: "role", check: role, seeds: role_seeds },
    ]
}

/// A piece of a block that a shard sends.
pub fn fetch_piece(bytes: &[u8]) -> bool {
    let Some((ours, mut theirs)) = decoded::<FetchPiece, plain::FetchResponse>(bytes) else { return false };
    check_id(ours.id);
    let id = theirs.id.get_or_insert_default();
    assert_eq!((u32::from(ours.id.level), ours.id.index), (id.level, id.index));
    assert_eq!(encoded(&ours), theirs.encode_to_vec());
    true
}

/// The beginning of a piece, byte for byte as it arrives, up to its payload.
pub fn piece_head(bytes: &[u8]) -> bool {
    for n in 0..=bytes.len() {
        match PieceHead::decode(&bytes[..n]) {
            Ok(None) => {}
            Err(reason) => return refused(&reason),
            Ok(Some(head)) => {
                check_id(head.id);
                check_whole(&head, &bytes[..n], head.payload.min(1 << 12));
                return true;
            }
        }
    }
    assert!(bytes.len() < 65, "no end to a head of {} bytes", bytes.len());
    false
}

/// Fails unless both decoders of the whole message take it for what its beginning says. A payload of some
/// bytes stands for a longer one.
fn check_whole(head: &PieceHead, bytes: &[u8], n_payload: usize) {
    let prefix = u32::from_be_bytes([bytes[1], bytes[2], bytes[3], bytes[4]]) as usize;
    assert_eq!(prefix - head.payload, bytes.len() - 5);
    if n_payload < head.payload {
        return;
    }
    let whole = [&bytes[5..], &vec![7; n_payload]].concat();
    let Some((piece, _)) = decoded::<FetchPiece, plain::FetchResponse>(&whole) else {
        panic!("a piece whose head is {head:?} is refused");
    };
    let payload = Payload::Bytes(vec![7; n_payload].into());
    let PieceHead { id, total_bytes, offset, version, .. } = *head;
    assert_eq!(piece, FetchPiece { id, total_bytes, offset, version, payload });
}

/// A piece of a push.
pub fn push_piece(bytes: &[u8]) -> bool {
    let Some((ours, theirs)) = decoded::<PushPiece, plain::PushRequest>(bytes) else { return false };
    let written = encoded(&ours);
    assert_eq!(plain::PushRequest::decode(&written[..]).ok().as_ref(), Some(&theirs));
    for id in ours.head.iter().flat_map(|head| &head.blocks) {
        match cluster_id(*id) {
            Some(found) => assert_eq!(block_id(found), *id),
            None => assert!(id.level > u32::from(u8::MAX)),
        }
    }
    let hashes = ours.head.and_then(|head| head.identity).map_or(0, |identity| identity.hashes.len());
    // A map has no order of its own.
    if hashes < 2 {
        assert_eq!(written, theirs.encode_to_vec());
    }
    true
}

/// The head of a request of the bulk stream, and the entries that follow it.
pub fn bulk_request(bytes: &[u8]) -> bool {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return false };
    let found = match Head::decode(head) {
        Ok(found) => found,
        Err(reason) => return refused(&reason),
    };
    assert_eq!(&found.encode(), head);
    let (entries, _) = rest.as_chunks::<ENTRY_BYTES>();
    let entries = &entries[..entries.len().min(found.n_blocks as usize)];
    let blocks = match decode_entries(entries.as_flattened()) {
        Ok(blocks) => blocks,
        Err(reason) => return refused(&reason),
    };
    let mut again = Vec::new();
    for &(id, n_bytes) in &blocks {
        check_id(id);
        encode_entry(id, n_bytes as usize, &mut again);
    }
    assert_eq!(again, entries.as_flattened());
    let held = &rest[entries.as_flattened().len()..];
    let n_held = if found.kind == Kind::FetchChanged { entries.len() * VERSION_BYTES } else { 0 };
    let held = &held[..held.len().min(n_held) / VERSION_BYTES * VERSION_BYTES];
    let mut again = Vec::new();
    encode_versions(decode_versions(held), &mut again);
    assert_eq!(again, held);
    entries.len() == found.n_blocks as usize && held.len() == n_held
}

/// A reply of the bulk stream, and the text that follows it.
pub fn bulk_reply(bytes: &[u8]) -> bool {
    let Some((reply, rest)) = bytes.split_first_chunk::<REPLY_BYTES>() else { return false };
    match Reply::decode(reply) {
        Err(reason) => refused(&reason),
        Ok(found) => {
            assert_eq!(&found.encode(), reply);
            assert!(found.n_text as usize <= MAX_TEXT && (found.code != Code::Ok || found.n_text == 0));
            rest.len() >= found.n_text as usize
        }
    }
}

/// What says who asks: a certificate, the names in it, a file of tokens, and the header of a request.
pub fn role(bytes: &[u8]) -> bool {
    let certificate = match Identity::of_certificate(bytes) {
        Err(error) => refused(&error.to_string()),
        Ok(identity) => {
            let uri = identity.uri();
            assert!(bytes.windows(uri.len()).any(|found| found == uri.as_bytes()));
            assert_eq!(Identity::new(identity.role(), identity.name()).ok(), Some(identity));
            true
        }
    };
    let text = str::from_utf8(bytes).is_ok_and(is_named);
    certificate || shows_token(bytes) || text
}

/// Whether a header shows the token of the server.
fn shows_token(header: &[u8]) -> bool {
    let Ok(tokens) = Tokens::parse(&format!("read = [\"{TOKEN}\"]")) else { return false };
    let peer = SocketAddr::from((Ipv4Addr::LOCALHOST, 1));
    let caller = Caller { peer, identity: None, token: Token::NotRead };
    match caller.with_token(Some(&tokens), Some(header)).token {
        Token::Unknown => false,
        token => {
            assert_eq!(token, Token::Grants(Permission::Read));
            assert!(header.trim_ascii_end().ends_with(TOKEN.as_bytes()));
            true
        }
    }
}

/// Whether a text is a role, a name or a file of tokens.
fn is_named(text: &str) -> bool {
    let role = match text.parse::<Role>() {
        Ok(role) => role.to_string() == text,
        Err(error) => refused(&error.to_string()),
    };
    let name = match text.parse::<BankName>() {
        Ok(name) => {
            assert!(name.as_str() == text && !text.contains(['/', '\\']) && !matches!(text, "." | ".."));
            true
        }
        Err(error) => refused(&error.to_string()),
    };
    let tokens = match Tokens::parse(text) {
        // The whole file is nobody's token.
        Ok(tokens) => tokens.permission_of(text.as_bytes()).is_none(),
        Err(error) => refused(&error.to_string()),
    };
    role || name || tokens
}

fn refused(reason: &str) -> bool {
    is_line(reason);
    false
}

fn check_id(id: ClusterId) {
    assert_eq!(cluster_id(block_id(id)), Some(id));
}

/// The message as our decoder has it, and as prost has it; `None` when it is refused.
fn decoded<O, T>(bytes: &[u8]) -> Option<(O, T)>
where
    O: Decode + PartialEq + Debug,
    T: Message + Default,
{
    let ours = O::get(&mut Bytes::copy_from_slice(bytes));
    // Wherever the bytes are divided.
    let (start, end) = bytes.split_at(bytes.len() / 2);
    let mut parts = Parts::new([start, end].map(Bytes::copy_from_slice).into_iter());
    let divided = O::get(&mut parts);
    assert_eq!(ours.as_ref().ok(), divided.as_ref().ok());
    assert!(divided.is_err() || !parts.has_remaining());
    match (ours, T::decode(bytes)) {
        (Ok(ours), Ok(theirs)) => Some((ours, theirs)),
        (Err(ours), theirs) => {
            let text = ours.to_string();
            is_line(&text);
            let is_own = STRICTER.iter().any(|reason| text.ends_with(reason));
            assert!(theirs.is_err() || is_own, "only we refuse: {text}");
            None
        }
        // Ours counts the groups of an unknown field from the message that they are in, one less.
        (Ok(_), Err(theirs)) => {
            assert!(theirs.to_string().contains("recursion limit"), "only prost refuses: {theirs}");
            None
        }
    }
}

fn encoded(message: &impl Encode) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.put(&mut bytes);
    assert!(bytes.len() <= message.most_bytes());
    bytes
}

fn fetch_pieces() -> Vec<Vec<u8>> {
    let piece = |level, index, payload: &'static [u8]| FetchPiece {
        id: ClusterId { level, index },
        total_bytes: 1 << 40,
        offset: 300,
        version: u64::from(index),
        payload: Payload::Bytes(Bytes::from_static(payload)),
    };
    let pieces =
        [piece(0, 0, b""), piece(2, 70_000, b"a piece"), piece(255, ClusterId::GENERIC, &[0xff; 64])];
    let mut seeds: Vec<Vec<u8>> = pieces.iter().map(encoded).collect();
    // An unknown field between the others, and every field twice.
    seeds.push([&seeds[1][..], &[0x82, 1, 3, b'x', b'y', b'z'], &seeds[2]].concat());
    seeds
}

/// As a shard sends them.
fn piece_heads() -> Vec<Vec<u8>> {
    let seed = |level, index, payload| {
        let id = ClusterId { level, index };
        let version = u64::from(index) << 31;
        let piece =
            FetchPiece { id, total_bytes: 1 << 40, offset: 300, version, payload: Payload::default() };
        let mut bytes = Vec::new();
        piece.put_head(payload, &mut bytes);
        bytes
    };
    vec![seed(0, 0, 1), seed(2, 70_000, 300), seed(255, ClusterId::GENERIC, 1 << 20)]
}

fn push_pieces() -> Vec<Vec<u8>> {
    let identity = |hashes: &[(&str, &str)]| proto::BankIdentity {
        attempt: 0,
        bank: "facts".to_owned(),
        spec: "5a".repeat(32),
        hashes: hashes.iter().map(|(key, hash)| ((*key).to_owned(), (*hash).to_owned())).collect(),
        shard: 1,
        n_shards: 4,
        life: hashes.len() as u64,
    };
    let head = |hashes: &[(&str, &str)]| PushPiece {
        head: Some(proto::PushHead {
            identity: Some(identity(hashes)),
            step: 12,
            rank: 3,
            dtype: Dtype::Bf16.message() as i32,
            blocks: vec![BlockId { level: 0, index: 7 }, BlockId { level: 3, index: u32::MAX }],
        }),
        ..PushPiece::default()
    };
    let payload = Payload::Bytes(Bytes::from_static(&[0x3f; 48]));
    let piece = PushPiece { head: None, block: u32::MAX, offset: 1 << 50, payload };
    let pieces = [head(&[]), head(&[("tree", "a1")]), head(&[("tree", "a1"), ("anchor", "b2")]), piece];
    let mut seeds: Vec<Vec<u8>> = pieces.iter().map(encoded).collect();
    seeds.push([&seeds[1][..], &seeds[3]].concat());
    seeds
}

fn bulk_requests() -> Vec<Vec<u8>> {
    let request = |kind, dtype, ids: &[(u8, u32)]| {
        let head = Head { kind, dtype, n_blocks: ids.len() as u32, step: 1 << 33, rank: 5 };
        let mut bytes = head.encode().to_vec();
        ids.iter().for_each(|&(level, index)| encode_entry(ClusterId { level, index }, 4096, &mut bytes));
        if kind == Kind::FetchChanged {
            encode_versions(ids.iter().map(|&(_, index)| u64::from(index) << 20), &mut bytes);
        }
        bytes
    };
    vec![
        request(Kind::Fetch, Dtype::F32, &[]),
        request(Kind::Fetch, Dtype::Bf16, &[(0, 1), (3, 65_535)]),
        request(Kind::Push, Dtype::F32, &[(255, u32::MAX), (1, 0), (2, 9)]),
        request(Kind::FetchChanged, Dtype::F32, &[(0, 0), (2, 9)]),
    ]
}

fn bulk_replies() -> Vec<Vec<u8>> {
    let reply = |code, text: &str| {
        let reply = Reply { code, retry_ms: 250, n_text: text.len() as u32, applied: 9 };
        [&reply.encode(), text.as_bytes()].concat()
    };
    vec![reply(Code::Ok, ""), reply(Code::NotFound, "no block 1/7"), reply(Code::Unauthenticated, "")]
}
