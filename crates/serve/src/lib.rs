//! A trained run as a service: memory by text, completions with it over HTTP in the form of OpenAI's, and a page
//! to look at both.

pub mod http;
pub mod memory;
pub mod page;
