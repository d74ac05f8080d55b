//go:build ignore

// SPDX-License-Identifier: (MIT OR GPL-2.0)
//
// egress stands on the devices that lead to the metadata service, and refuses
// packets to it that no socket of the host has made, or that do not carry one of
// the host's own addresses as their source. It sees what the forward hook never does: macvlan and bridged
// neighbours of the uplink, packets that an eBPF CNI redirects.
//
// The frame is read from its first byte on. skb->protocol and the header offsets
// would be cheaper, but a container with CAP_NET_RAW names them itself, and
// macvlan passes the lie on (sockaddr_ll.sll_protocol, packet(7)).
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// The same numbers mean the same to tcx (TCX_NEXT, TCX_DROP). Whoever comes after
// us has a say about what passes.
#define PASS TC_ACT_UNSPEC
#define REFUSE TC_ACT_SHOT

// Why something was refused; indices of the map below.
#define IMDS 0       // the metadata service
#define WIRESERVER 1 // Azure's WireServer, one of its two closed ports

#define WIRE_HTTP bpf_htons(80)
#define WIRE_HOSTGA bpf_htons(32526)

#define FRAGMENT bpf_htons(0x3fff) // more fragments, or not the first
#define MAX_TAGS 2		   // VLAN tags that are looked behind
#define MAX_GUARDED 16
#define MAX_OWN 65536 // kube-proxy with IPVS gives the host thousands of addresses

// Cookie of the host's network namespace; 0: not known, or the kernel does not tell
// (the helper is there for such programs from about Linux 6.15 on).
volatile const __u64 host_netns;

// An address in network byte order, IPv4 as ::ffff:a.b.c.d.
struct address {
	__u32 word[4];
};
_Static_assert(sizeof(struct address) == 16, "the size of netip.Addr.As16");

struct port {
	__u16 protocol;
	__u16 number; // network byte order
};
_Static_assert(sizeof(struct port) == 4, "no padding in a key");

// Destinations that are guarded, and as what: IMDS or WIRESERVER.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_GUARDED);
	__type(key, struct address);
	__type(value, __u32);
} guarded SEC(".maps");

// Ports of the metadata addresses that stay open: DNS and NTP on some clouds.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MAX_GUARDED);
	__type(key, struct port);
	__type(value, __u8);
} open_ports SEC(".maps");

// The host's own addresses, kept by the agent.
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_OWN);
	__type(key, struct address);
	__type(value, __u8);
} own SEC(".maps");

// Counters: packets that were refused, by reason.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 2);
	__type(key, __u32);
	__type(value, __u64);
} refused SEC(".maps");

struct packet {
	struct address from, to;
	struct port port; // destination; number is 0 where it cannot be read
	__u8 fragment;
};

static __always_inline int refuse(__u32 reason)
{
	__u64 *n = bpf_map_lookup_elem(&refused, &reason);
	if (n)
		__sync_fetch_and_add(n, 1);
	return REFUSE;
}

static __always_inline void read_port(struct __sk_buff *skb, __u32 at, struct packet *p)
{
	if (p->port.protocol != IPPROTO_TCP && p->port.protocol != IPPROTO_UDP)
		return;
	// Both have the destination at the same place.
	if (bpf_skb_load_bytes(skb, at + 2, &p->port.number, 2))
		p->port.number = 0;
}

// Whether a socket of the host has made the packet. A packet keeps its socket on a
// macvlan and through a bridge, and loses it where it is forwarded: what the host
// masquerades is not the host's. Without a socket the helper would tell of the
// initial namespace.
static __always_inline int made_by_host(struct __sk_buff *skb)
{
	if (!host_netns)
		return 1;
	return skb->sk && bpf_get_netns_cookie(skb) == host_netns;
}

static __always_inline int judge(struct __sk_buff *skb, struct packet *p)
{
	__u32 *what = bpf_map_lookup_elem(&guarded, &p->to);
	// Somebody else's traffic.
	if (!what)
		return PASS;
	// The host's. Where the kernel does not tell who made it, it may also be
	// masqueraded: then the forward hook has seen it.
	if (made_by_host(skb) && bpf_map_lookup_elem(&own, &p->from))
		return PASS;
	if (*what == WIRESERVER) {
		// DNS on UDP and TCP 53, and whatever else is not TCP.
		if (p->port.protocol != IPPROTO_TCP)
			return PASS;
		// The ports of a fragment are elsewhere or half there, and nobody
		// fragments TCP in earnest.
		if (p->fragment || !p->port.number || p->port.number == WIRE_HTTP || p->port.number == WIRE_HOSTGA)
			return refuse(WIRESERVER);
		return PASS;
	}
	if (!p->fragment && p->port.number && bpf_map_lookup_elem(&open_ports, &p->port))
		return PASS;
	return refuse(IMDS);
}

static __always_inline int judge4(struct __sk_buff *skb, __u32 at)
{
	struct iphdr h;
	// Too short for a header: nobody will take it for IPv4.
	if (bpf_skb_load_bytes(skb, at, &h, sizeof(h)) || h.version != 4)
		return PASS;
	struct packet p = {
		.from = {{0, 0, bpf_htonl(0xffff), h.saddr}},
		.to = {{0, 0, bpf_htonl(0xffff), h.daddr}},
		.port = {.protocol = h.protocol},
		.fragment = (h.frag_off & FRAGMENT) != 0,
	};
	read_port(skb, at + 4 * h.ihl, &p);
	return judge(skb, &p);
}

static __always_inline int judge6(struct __sk_buff *skb, __u32 at)
{
	struct ipv6hdr h;
	if (bpf_skb_load_bytes(skb, at, &h, sizeof(h)) || h.version != 6)
		return PASS;
	// Behind an extension header no port is looked for: such a packet, and so
	// every fragment, has no open port.
	struct packet p = {.port = {.protocol = h.nexthdr}};
	__builtin_memcpy(&p.from, &h.saddr, sizeof(p.from));
	__builtin_memcpy(&p.to, &h.daddr, sizeof(p.to));
	read_port(skb, at + sizeof(h), &p);
	return judge(skb, &p);
}

// For devices whose frames begin with an Ethernet header.
SEC("tc")
int imdsgate_ether(struct __sk_buff *skb)
{
	__u32 at = 2 * ETH_ALEN;
	__u16 proto;
	if (bpf_skb_load_bytes(skb, at, &proto, sizeof(proto)))
		return PASS; // no frame
#pragma unroll
	for (int i = 0; i < MAX_TAGS; i++) {
		if (proto != bpf_htons(ETH_P_8021Q) && proto != bpf_htons(ETH_P_8021AD))
			break;
		at += 4;
		if (bpf_skb_load_bytes(skb, at, &proto, sizeof(proto)))
			return PASS; // a tag and nothing behind it
	}
	if (proto == bpf_htons(ETH_P_IP))
		return judge4(skb, at + 2);
	if (proto == bpf_htons(ETH_P_IPV6))
		return judge6(skb, at + 2);
	return PASS; // ARP and the like
}

// For devices whose frames begin with an IP header: tun, WireGuard, PPP.
SEC("tc")
int imdsgate_ip(struct __sk_buff *skb)
{
	__u8 first;
	if (bpf_skb_load_bytes(skb, 0, &first, sizeof(first)))
		return PASS; // empty
	return first >> 4 == 6 ? judge6(skb, 0) : judge4(skb, 0);
}

char __license[] SEC("license") = "Dual MIT/GPL";
