package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Start runs a cluster for one test and stops it with the test; it fails the
// test when the cluster does not start. It costs some seconds: tests that can
// share one call Run in their package's TestMain, and keep apart by Prefix or
// Namespace.
func Start(t testing.TB, opts ...Option) *Cluster {
	t.Helper()
	c, err := Run(t.Context(), opts...)
	if err != nil {
		t.Fatalf("start a cluster: %v", err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Errorf("stop the cluster: %v", err)
		}
	})
	return c
}

// skippedEnv names a file that collects the names of skipped tests, a line each.
const skippedEnv = "IMPS_TEST_SKIPPED"

// NeedNode skips a test where no node can run, and adds its name to the file
// that IMPS_TEST_SKIPPED names, if any. Where CI is set, it fails the test: CI
// runs everything.
func NeedNode(t testing.TB) {
	t.Helper()
	if err := CanStartNode(); err != nil {
		skip(t, err)
	}
}

func skip(t testing.TB, reason error) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatal(reason)
	}
	if path := os.Getenv(skippedEnv); path != "" {
		list, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600) //nolint:gosec // named by whoever runs the tests
		if err == nil {
			_, err = fmt.Fprintln(list, t.Name())
			err = errors.Join(err, list.Close())
		}
		if err != nil {
			t.Fatalf("list the test as skipped: %v", err)
		}
	}
	t.Skip(reason)
}

// NodeFor starts a node for one test and stops it with the test; see NeedNode
// for where none can run. When the test fails, it prints the end of the
// kubelet's log.
func (c *Cluster) NodeFor(t testing.TB, cfg NodeConfig) *Node {
	t.Helper()
	NeedNode(t)
	n, err := c.StartNode(t.Context(), cfg)
	if err != nil {
		t.Fatalf("start a node: %v", err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the kubelet's log ends:\n%s", tail(n.Log()))
		}
		if err := n.Stop(); err != nil {
			t.Errorf("stop the node: %v", err)
		}
	})
	return n
}

var notDNS = regexp.MustCompile(`[^a-z0-9]+`)

// Prefix returns a name for the test's objects in a shared cluster: a DNS label
// of at most 32 characters, made from the test's name and five random
// characters, different in each call.
func Prefix(t testing.TB) string {
	t.Helper()
	const longest = 26
	name := strings.ToLower(strings.TrimPrefix(t.Name(), "Test"))
	name = strings.Trim(notDNS.ReplaceAllString(name, "-"), "-")
	if len(name) > longest {
		// The end of a subtest's name tells more than its parent's.
		name = strings.Trim(name[len(name)-longest:], "-")
	}
	// A label may begin with a digit, but not every kind of name may.
	if name == "" || (name[0] >= '0' && name[0] <= '9') {
		name = "t" + name[min(len(name), 1):]
	}
	return name + "-" + strings.ToLower(rand.Text()[:5])
}

// Namespace creates a namespace named by Prefix, with labels if any, and starts
// its deletion when the test ends. It returns the name.
func (c *Cluster) Namespace(t testing.TB, labels map[string]string) string {
	t.Helper()
	namespaces := c.client.CoreV1().Namespaces()
	name := Prefix(t)
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	if _, err := namespaces.Create(t.Context(), namespace, metav1.CreateOptions{}); err != nil {
		t.Fatalf("create namespace %s: %v", name, err)
	}
	t.Cleanup(func() {
		// The test's context has ended by now. Whether the namespace can be
		// deleted is not what the test is about.
		_ = namespaces.Delete(context.WithoutCancel(t.Context()), name, metav1.DeleteOptions{})
	})
	return name
}
