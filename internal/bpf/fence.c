//go:build ignore

// SPDX-License-Identifier: (MIT OR GPL-2.0)
//
// fence stands on the agent's own cgroup. A socket keeps the cgroup of its
// creator for life, so every listener that the agent opens inside a container,
// and every connection accepted from one, meets this program when somebody
// tries to connect it somewhere, bind it anew, let it listen elsewhere or change
// its options: a compromised proxy cannot turn a handed-over socket into a door to
// the container's own loopback or to the host, nor spoil it for the next proxy. The
// one connect that may pass is the agent's own, in the host's namespace, to the
// configured upstream; bind is the agent's alone.
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define DENY 0 // the caller gets EPERM, a packet is dropped
#define ALLOW 1
#define allow_quietly ALLOW // not counted: it happens all the time

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define SOL_SOCKET 1
#define SO_KEEPALIVE 9
#define SOL_TCP 6
#define TCP_NODELAY 1
#define TCP_KEEPIDLE 4
#define TCP_KEEPINTVL 5
#define TCP_KEEPCNT 6

#define IMDS_PORT 80

// 169.254.169.254 and fd00:ec2::254, network byte order.
#define IMDS4 bpf_htonl(0xa9fea9fe)
#define IMDS6_0 bpf_htonl(0xfd000ec2)
#define IMDS6_3 bpf_htonl(0x00000254)

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

// What a fenced socket may hear: the metadata service's own port in a container,
// and the upstream in the host's namespace. A socket that somebody disconnects
// and lets listen on a port of the kernel's choosing (no hook sees that) stays deaf.
static __always_inline int heard(const __u32 *src, const __u32 *dst, const __u16 *port)
{
	if (src[0] == upstream[0] && src[1] == upstream[1] && src[2] == upstream[2] &&
	    src[3] == upstream[3] && port[0] == upstream_port)
		return allow_quietly;
	if (port[1] != bpf_htons(IMDS_PORT))
		return deny();
	if (dst[2] == bpf_htonl(0xffff) && dst[3] == IMDS4)
		return allow_quietly;
	if (dst[0] == IMDS6_0 && !dst[1] && !dst[2] && dst[3] == IMDS6_3)
		return allow_quietly;
	return deny();
}

SEC("cgroup_skb/ingress")
int fence_ingress(struct __sk_buff *skb)
{
	__u32 src[4] = { 0, 0, bpf_htonl(0xffff), 0 }, dst[4] = { 0, 0, bpf_htonl(0xffff), 0 };
	__u16 port[2]; // source, destination
	__u32 l4;
	__u8 proto, first;

	// The packet starts with its network header.
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		if (bpf_skb_load_bytes(skb, 0, &first, 1) || bpf_skb_load_bytes(skb, 9, &proto, 1) ||
		    bpf_skb_load_bytes(skb, 12, &src[3], 4) || bpf_skb_load_bytes(skb, 16, &dst[3], 4))
			return deny();
		l4 = (first & 0xf) * 4;
	} else if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		if (bpf_skb_load_bytes(skb, 6, &proto, 1) || bpf_skb_load_bytes(skb, 8, src, 16) ||
		    bpf_skb_load_bytes(skb, 24, dst, 16))
			return deny();
		l4 = 40; // our peers send no extension headers
	} else {
		return deny();
	}
	if (proto != IPPROTO_TCP || bpf_skb_load_bytes(skb, l4, port, 4))
		return deny();
	return heard(src, dst, port);
}

// Options of a fenced socket are the agent's, but for those that a server sets on
// the connections it accepts. Others would outlive the proxy that set them: a
// filter or a minimum TTL on a listener, a linger time that blocks whoever closes.
SEC("cgroup/setsockopt")
int fence_option(struct bpf_sockopt *o)
{
	if (bpf_get_current_cgroup_id() == agent_cgroup)
		return allow_quietly;
	if (o->level == SOL_SOCKET && o->optname == SO_KEEPALIVE)
		return allow_quietly;
	if (o->level == SOL_TCP)
		switch (o->optname) {
		case TCP_NODELAY:
		case TCP_KEEPIDLE:
		case TCP_KEEPINTVL:
		case TCP_KEEPCNT:
			return allow_quietly;
		}
	return deny();
}

char __license[] SEC("license") = "Dual MIT/GPL";
