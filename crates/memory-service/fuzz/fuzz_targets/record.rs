//! The records of a commit.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_bank::fuzzing::record(bytes);
});
