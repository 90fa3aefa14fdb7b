//! A request of the bulk stream.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    memory_service::fuzzing::bulk_request(bytes);
});
