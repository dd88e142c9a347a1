package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

const (
	systemNamespace   = "imps-system"
	renderedNamespace = "imps-rendered"
	sourceNamespace   = "registry-access"
	secretName        = "imps-pull-secret"
	resourceName      = "demo"
)

// install builds the binary and applies the chart. The workloads in it stay objects, since there is
// no kubelet: the demo runs the same binary with the same arguments itself.
func (d *demo) install(ctx context.Context) error {
	begin := time.Now()
	root, err := output(ctx, "", "go", "list", "-m", "-f", "{{.Dir}}", "github.com/imps-node/imps")
	if err != nil {
		return err
	}
	d.binary = filepath.Join(d.dir, "imps-node")
	if _, err := output(ctx, root, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", d.binary, "./cmd/imps-node"); err != nil {
		return err
	}
	d.say("   cmd/imps-node built in %.1f s", time.Since(begin).Seconds())

	begin = time.Now()
	helm, err := output(ctx, root, filepath.Join(root, "hack", "tool"), "helm")
	if err != nil {
		return err
	}
	manifests, err := output(ctx, root, helm, "template", "imps-node", "deploy/daemonset", "--include-crds", "--namespace", systemNamespace,
		"--set", "createNamespaces.release=true,createNamespaces.sources=true")
	if err != nil {
		return err
	}
	if err := d.control.Apply(ctx, []byte(manifests)); err != nil {
		return err
	}
	d.say("   deploy/daemonset rendered by helm and applied in %.1f s: the CRD, namespaces, identities, rights", time.Since(begin).Seconds())
	return nil
}

// output runs a program in a folder and returns what it prints.
func output(ctx context.Context, folder, program string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, program, args...) //nolint:gosec // the go tool, and programs of this repository
	cmd.Dir = folder
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	// What a program started itself may hold its output open for a moment.
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w: %s", filepath.Base(program), args[0], err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), nil
}

// The registries, each with a source Secret; their names end in the domain that is reserved for tests.
const (
	hub  = "hub.test"
	git  = "git.test"
	user = "robot"
)

// passwords are passwords by registry.
type passwords map[string]string

// newPassword changes the password for a registry. It is random, so that it can be looked for where
// it must not be.
func (d *demo) newPassword(registry string) {
	d.passwords[registry] = rand.Text()
	d.used = append(d.used, d.passwords[registry])
}

// resource is what the demo is about; the audience sees it.
const resource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: ` + resourceName + `
spec:
  registry:
    credentials:                # merged in this order
    - {name: hub, namespace: ` + sourceNamespace + `}
    - {name: git, namespace: ` + sourceNamespace + `}
  target:
    secret: {name: ` + secretName + `}
    namespaces:                 # selected when any entry matches
      names: [shop]
      labels: [{matchLabels: {pull: private}}]
      annotations: [{matchAnnotations: {example.test/pull: "from: private registries"}}]
    namespacesWithPods:         # or any of these matches a Pod in it
      labels: [{matchLabels: {image: private}}]
      annotations: [{matchAnnotations: {example.test/image: private}}]
`

// What the selectors above match.
var (
	namespaceLabels      = map[string]string{"pull": "private"}
	namespaceAnnotations = map[string]string{"example.test/pull": "from: private registries"}
	podLabels            = map[string]string{"image": "private"}
	podAnnotations       = map[string]string{"example.test/image": "private"}
)

// create makes the sources and the resource.
func (d *demo) create(ctx context.Context) error {
	d.passwords = passwords{}
	for _, registry := range []string{hub, git} {
		d.newPassword(registry)
		source := d.source(registry)
		if _, err := d.client.CoreV1().Secrets(sourceNamespace).Create(ctx, source, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create source %s: %w", source.Name, err)
		}
		d.say("   Secret %s/%s: credentials for %s", sourceNamespace, source.Name, registry)
	}
	for line := range strings.Lines(resource) {
		d.say("   | %s", strings.TrimRight(line, "\n"))
	}
	return d.control.Apply(ctx, []byte(resource))
}

// source returns a Secret with the current credentials for a registry, named after it.
func (d *demo) source(registry string) *corev1.Secret {
	config, err := json.Marshal(map[string]any{"auths": map[string]any{
		registry: map[string]string{"username": user, "password": d.passwords[registry]},
	}})
	if err != nil {
		panic(err) // strings in maps
	}
	return &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: strings.TrimSuffix(registry, ".test")},
		Type:       corev1.SecretTypeDockerConfigJson,
		Data:       map[string][]byte{corev1.DockerConfigJsonKey: config},
	}
}

// passwordsIn returns the passwords that a pull Secret holds, by registry.
func passwordsIn(secret *corev1.Secret) passwords {
	var config struct {
		Auths map[string]struct {
			Password string `json:"password"`
		} `json:"auths"`
	}
	if json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config) != nil {
		return nil // which is not what anyone expects
	}
	found := passwords{}
	for registry, entry := range config.Auths {
		found[registry] = entry.Password
	}
	return found
}
