// Package e2e holds tests that run the clouds' own SDKs against imdsgate: each
// client is a process inside a container's network namespace, it calls
// http://169.254.169.254 as it always does, and the address is the gate's.
//
// It is a module of its own, so that the SDKs are no dependencies of imdsgate.
// The tests need root; those of JavaScript need node and npm too.
package e2e
