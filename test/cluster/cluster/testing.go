package cluster

import (
	"context"
	"crypto/rand"
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
