// The one function of torch 2.11 that Transformer Engine 2.11's extension asks for and that torch
// 2.13 no longer has. Compiled in only where torch lacks it: it copies nothing, since no tensor
// of the stand-in is copied lazily.
namespace c10 {
struct StorageImpl;
namespace impl::cow {
__attribute__((visibility("default"))) void materialize_cow_storage(StorageImpl&) {}
}  // namespace impl::cow
}  // namespace c10
