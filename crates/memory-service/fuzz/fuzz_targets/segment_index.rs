//! The index of a file of blocks.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_bank::fuzzing::segment_index(bytes);
});
