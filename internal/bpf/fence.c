//go:build ignore

// SPDX-License-Identifier: (MIT OR GPL-2.0)
//
// fence stands on the agent's own cgroup. A socket keeps the cgroup of its
// creator for life, so every listener that the agent opens inside a container,
// and every connection accepted from one, meets this program when somebody
// tries to connect it somewhere, or to bind it anew: a compromised proxy cannot
// turn a handed-over socket into a door to the container's own loopback, nor stand
// there as one of its services. The one connect that may pass is the agent's own,
// in the host's namespace, to the configured upstream; bind is the agent's alone.
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define DENY 0 // the caller gets EPERM
#define ALLOW 1

// Set before loading; constants for the verifier.
volatile const __u64 agent_cgroup; // cgroup v2 id of the agent
volatile const __u64 host_netns;   // cookie of the host's network namespace
volatile const __u32 upstream[4];  // network byte order; IPv4 as ::ffff:a.b.c.d
volatile const __u16 upstream_port; // network byte order

// Counters: what was refused and what passed. The agent reads them.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} verdicts SEC(".maps");

static __always_inline void count(__u32 verdict)
{
	__u64 *n = bpf_map_lookup_elem(&verdicts, &verdict);
	if (n)
		__sync_fetch_and_add(n, 1);
}

static __always_inline int deny(void)
{
	count(DENY);
	return DENY;
}

static __always_inline int allow(void)
{
	count(ALLOW);
	return ALLOW;
}

// own_call: the caller is the agent and the socket lives in the host's namespace.
static __always_inline int own_call(struct bpf_sock_addr *c)
{
	return bpf_get_current_cgroup_id() == agent_cgroup &&
	       bpf_get_netns_cookie(c) == host_netns;
}

SEC("cgroup/connect4")
int fence4(struct bpf_sock_addr *c)
{
	if (!own_call(c))
		return deny();
	if (upstream[0] || upstream[1] || upstream[2] != bpf_htonl(0xffff))
		return deny(); // the upstream is an IPv6 address
	if (c->user_ip4 != upstream[3] || (__u16)c->user_port != upstream_port)
		return deny();
	return allow();
}

SEC("cgroup/connect6")
int fence6(struct bpf_sock_addr *c)
{
	if (!own_call(c))
		return deny();
	if (c->user_ip6[0] != upstream[0] || c->user_ip6[1] != upstream[1] ||
	    c->user_ip6[2] != upstream[2] || c->user_ip6[3] != upstream[3] ||
	    (__u16)c->user_port != upstream_port)
		return deny();
	return allow();
}

// The agent binds its listeners; nobody binds them again.
static __always_inline int own_bind(void)
{
	return bpf_get_current_cgroup_id() == agent_cgroup ? allow() : deny();
}

SEC("cgroup/bind4")
int fence_bind4(struct bpf_sock_addr *c)
{
	return own_bind();
}

SEC("cgroup/bind6")
int fence_bind6(struct bpf_sock_addr *c)
{
	return own_bind();
}

char __license[] SEC("license") = "Dual MIT/GPL";
