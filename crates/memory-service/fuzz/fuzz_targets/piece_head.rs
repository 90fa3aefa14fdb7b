//! The beginning of a message of a fetch.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_service::fuzzing::piece_head(bytes);
});
