//go:build ignore

// SPDX-License-Identifier: (MIT OR GPL-2.0)
//
// steer gives the metadata service's address, port 80, to the listener that
// lives in the same network namespace. One program and one map per namespace: a
// shared map would turn a wrong slot into a wrong identity.
#include <linux/bpf.h>
#include <linux/in.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#define LOOPBACK_IFINDEX 1 // in every network namespace (net/core/dev.c)
#define AF_INET 2
#define AF_INET6 10
#define IMDS_PORT 80

// 169.254.169.254 and fd00:ec2::254, network byte order.
#define IMDS4 bpf_htonl(0xa9fea9fe)
#define IMDS6_0 bpf_htonl(0xfd000ec2)
#define IMDS6_3 bpf_htonl(0x00000254)

// Slot 0 holds the IPv4 listener, slot 1 the IPv6 one. The sizes stand here
// instead of types on purpose: a SOCKMAP refuses BTF types, but only after a full
// RCU grace period (some 25 ms each time).
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 2);
	__uint(key_size, 4);
	__uint(value_size, 8);
} gate SEC(".maps");

static __always_inline int to_imds(struct bpf_sk_lookup *c)
{
	if (c->family == AF_INET)
		return c->local_ip4 == IMDS4;
	if (c->family != AF_INET6)
		return 0;
	return c->local_ip6[0] == IMDS6_0 && c->local_ip6[1] == 0 &&
	       c->local_ip6[2] == 0 && c->local_ip6[3] == IMDS6_3;
}

SEC("sk_lookup")
int steer(struct bpf_sk_lookup *c)
{
	// Somebody else's traffic.
	if (!to_imds(c))
		return SK_PASS;
	// Came in over a wire: a neighbour, who must not get this namespace's identity.
	// The field exists since Linux 5.17.
	if (c->ingress_ifindex != LOOPBACK_IFINDEX)
		return SK_DROP;
	// Other services of the address (DNS, NTP) are not ours. local_port is in
	// host byte order.
	if (c->protocol != IPPROTO_TCP || c->local_port != IMDS_PORT)
		return SK_PASS;

	__u32 slot = c->family == AF_INET6;
	struct bpf_sock *sk = bpf_map_lookup_elem(&gate, &slot);
	// The listener is gone: never fall through to the app's own 0.0.0.0:80.
	if (!sk)
		return SK_DROP;
	long err = bpf_sk_assign(c, sk, 0);
	bpf_sk_release(sk);
	return err ? SK_DROP : SK_PASS;
}

char __license[] SEC("license") = "Dual MIT/GPL";
