//! A message of a push, ours against prost.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_service::fuzzing::push_piece(bytes);
});
