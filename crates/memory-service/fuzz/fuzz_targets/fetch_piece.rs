//! A message of a fetch, ours against prost.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_service::fuzzing::fetch_piece(bytes);
});
