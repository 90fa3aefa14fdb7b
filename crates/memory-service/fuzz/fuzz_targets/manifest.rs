//! The manifest of a bank.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_bank::fuzzing::manifest(bytes);
});
