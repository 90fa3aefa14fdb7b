//! Certificates, names, files of tokens.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_service::fuzzing::role(bytes);
});
