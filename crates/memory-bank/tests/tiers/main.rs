//! A bank read through tiers: the same bits from each, bounds, restarts, damage, and tiers that are
//! slow or fail.

mod bits;
mod disk;
mod encoding;
mod flights;
mod options;
mod ram;
mod slow;
mod support;
