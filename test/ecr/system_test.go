package ecr

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/imps"
	"github.com/imps-node/imps/test/registry"
)

const (
	// within is how long anything may take: a Lease runs out after up to 18 s.
	within    = 40 * time.Second
	leaseName = "73de1ad9.banzaicloud.io"
	canary    = "canary-51e9a7-never-printed"

	// Principals, and what they may.
	coordinatorUser = "arn:aws:iam::111111111111:user/coordinator"
	customerUser    = "arn:aws:iam::222222222222:user/customer"
	pullRole        = "arn:aws:iam::333333333333:role/pull"
	otherRole       = "arn:aws:iam::444444444444:role/pull"
	externalID      = "external-" + canary

	frankfurt = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
)

// system is a cluster with imps and an AWS, for one test.
type system struct {
	t       *testing.T
	core    kubernetes.Interface
	dynamic dynamic.Interface
	aws     *fakeaws.Server
	awsURL  string
	// prefix starts the names of everything cluster-scoped that the test makes.
	prefix string
	// dir holds the kubeconfigs and logs of its processes.
	dir string
}

func newSystem(t *testing.T) *system {
	t.Helper()
	core, err := kubernetes.NewForConfig(control.Admin())
	require.NoError(t, err)
	dyn, err := dynamic.NewForConfig(control.Admin())
	require.NoError(t, err)
	s := &system{t: t, core: core, dynamic: dyn, aws: fakeaws.New(), prefix: cluster.Prefix(t), dir: t.TempDir()}
	s.aws.AddKey(fakeaws.Key{AccessKeyID: "AKIACOORDINATOR", SecretAccessKey: canary + "-coordinator", Principal: coordinatorUser})
	s.aws.AddKey(fakeaws.Key{AccessKeyID: "AKIACUSTOMER", SecretAccessKey: canary + "-customer", Principal: customerUser})
	s.aws.AddRole(fakeaws.Role{ARN: pullRole, ExternalID: externalID})
	s.aws.AddRole(fakeaws.Role{ARN: otherRole})
	server := httptest.NewServer(s.aws)
	s.awsURL = server.URL
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	t.Cleanup(s.removeEverything)
	t.Cleanup(s.findCanaries)
	return s
}

// removeEverything deletes what the test made, so that the next one starts from nothing.
func (s *system) removeEverything() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	all := metav1.ListOptions{}
	labelled := metav1.ListOptions{LabelSelector: impsync.LabelComponent}
	core := s.core.CoreV1()
	require.NoError(s.t, s.dynamic.Resource(v1alpha1.Resource).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, core.Secrets(imps.SourceNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, all))
	require.NoError(s.t, core.Secrets(imps.SystemNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	require.NoError(s.t, core.Secrets(imps.RenderedNamespace).DeleteCollection(ctx, metav1.DeleteOptions{}, labelled))
	s.freeLease()
}

// freeLease takes the Lease from whoever held it and was killed.
func (s *system) freeLease() {
	err := s.core.CoordinationV1().Leases(imps.SystemNamespace).Delete(context.Background(), leaseName, metav1.DeleteOptions{})
	if !apierrors.IsNotFound(err) {
		require.NoError(s.t, err)
	}
}

// findCanaries looks for keys, session tokens and ECR's passwords where they must not be: everywhere but in the data of
// Secrets.
func (s *system) findCanaries() {
	ctx := context.Background()
	needles := []string{canary}
	for _, g := range s.aws.Grants() {
		needles = append(needles, g.Password)
	}
	look := func(where, text string) {
		for _, needle := range needles {
			require.NotContains(s.t, text, needle, where)
		}
	}
	asText := func(object any, err error) string {
		require.NoError(s.t, err)
		raw, err := json.Marshal(object)
		require.NoError(s.t, err)
		return string(raw)
	}
	events, err := s.core.CoreV1().Events("").List(ctx, metav1.ListOptions{})
	look("Events", asText(events, err))
	configMaps, err := s.core.CoreV1().ConfigMaps("").List(ctx, metav1.ListOptions{})
	look("ConfigMaps", asText(configMaps, err))
	resources, err := s.dynamic.Resource(v1alpha1.Resource).List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	for i := range resources.Items { // the external ID stands in its spec
		status, _, err := unstructured.NestedMap(resources.Items[i].Object, "status")
		look("status", asText(status, err))
	}
	secrets, err := s.core.CoreV1().Secrets("").List(ctx, metav1.ListOptions{})
	require.NoError(s.t, err)
	for i := range secrets.Items {
		look("metadata of Secrets", asText(secrets.Items[i].ObjectMeta, nil))
	}
	logs, err := filepath.Glob(filepath.Join(s.dir, "*.log"))
	require.NoError(s.t, err)
	for _, log := range logs {
		raw, err := os.ReadFile(log)
		require.NoError(s.t, err)
		look(log, string(raw))
		require.NotContains(s.t, string(raw), "DATA RACE", log)
		require.NotContains(s.t, string(raw), "panic", log)
	}
}

// eventually waits until check returns no error.
func (s *system) eventually(check func() error, message string, args ...any) {
	s.t.Helper()
	imps.Eventually(s.t, within, check, message, args...)
}

// pass lets some time pass.
func (s *system) pass(d time.Duration) {
	select {
	case <-time.After(d):
	case <-s.t.Context().Done():
	}
}

// coordinator starts a coordinator with an access key of its own, or with none where key is empty.
func (s *system) coordinator(name, key string) *imps.Process {
	s.t.Helper()
	spec, err := imps.Coordinator(s.t.Context(), control)
	require.NoError(s.t, err)
	spec.Name = name
	return s.start(spec, key)
}

// agents starts agents, each on a node of its own, with the coordinator's access key within their reach, and waits until they
// are ready.
func (s *system) agents(n int) {
	s.t.Helper()
	processes := make([]*imps.Process, n)
	for i := range processes {
		spec, err := imps.Agent(s.t.Context(), control, fmt.Sprint(s.prefix, "node-", i))
		require.NoError(s.t, err)
		processes[i] = s.start(spec, "coordinator")
	}
	ctx, cancel := context.WithTimeout(s.t.Context(), 2*time.Minute)
	defer cancel()
	for _, p := range processes {
		require.NoError(s.t, p.AwaitReady(ctx))
	}
}

// start starts imps with an access key for AWS, or with none where key is empty.
func (s *system) start(spec imps.Spec, key string) *imps.Process {
	s.t.Helper()
	spec.Env = append(spec.Env,
		"AWS_ENDPOINT_URL_ECR="+s.awsURL, "AWS_ENDPOINT_URL_ECR_PUBLIC="+s.awsURL, "AWS_ENDPOINT_URL_STS="+s.awsURL,
		"AWS_CONFIG_FILE="+os.DevNull, "AWS_SHARED_CREDENTIALS_FILE="+os.DevNull, "AWS_EC2_METADATA_DISABLED=true")
	if key != "" {
		spec.Env = append(spec.Env, "AWS_ACCESS_KEY_ID=AKIA"+strings.ToUpper(key), "AWS_SECRET_ACCESS_KEY="+canary+"-"+key)
	}
	p, err := imps.Start(context.WithoutCancel(s.t.Context()), control, binary, s.dir, spec)
	require.NoError(s.t, err)
	s.t.Cleanup(func() {
		select {
		case <-p.Ended():
		default:
			require.NoError(s.t, p.Terminate())
		}
	})
	return p
}

// leads waits until a process leads.
func (s *system) leads(p *imps.Process) {
	s.t.Helper()
	s.eventually(func() error {
		raw, err := os.ReadFile(p.LogFile)
		if err != nil {
			return err
		}
		if bytes.Count(raw, []byte("msg=leading")) <= bytes.Count(raw, []byte(`msg="no longer leading"`)) {
			return errors.New("it does not")
		}
		return nil
	}, "%s does not lead", p.Name)
}

func (s *system) namespace() string { return control.Namespace(s.t, nil) }

// source writes a source Secret.
func (s *system) source(name string, secretType corev1.SecretType, data map[string]string) {
	s.t.Helper()
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Namespace: imps.SourceNamespace, Name: name}, Type: secretType, StringData: data}
	secrets := s.core.CoreV1().Secrets(imps.SourceNamespace)
	_, err := secrets.Create(s.t.Context(), secret, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		_, err = secrets.Update(s.t.Context(), secret, metav1.UpdateOptions{})
	}
	require.NoError(s.t, err)
}

// keys writes a source Secret of IMPS's ECR type, for frankfurt; "key=" with a value replaces one.
func (s *system) keys(name string, edits ...string) {
	s.t.Helper()
	data := map[string]string{"accountID": "123456789012", "region": "eu-central-1", "accessKeyID": "AKIACUSTOMER", "secretKey": canary + "-customer"}
	for _, edit := range edits {
		key, value, _ := strings.Cut(edit, "=")
		data[key] = value
	}
	s.source(name, "banzaicloud.io/aws-ecr-login-config", data)
}

// resource creates an ImagePullSecret for a namespace, with these credentials in YAML.
func (s *system) resource(name, namespace, credentials string) {
	s.t.Helper()
	spec := map[string]any{}
	require.NoError(s.t, yaml.Unmarshal([]byte(`
target: {secret: {name: `+imps.SecretName+`}, namespaces: {names: [`+namespace+`]}}
registry:
  credentials: `+credentials), &spec))
	_, err := s.dynamic.Resource(v1alpha1.Resource).Create(s.t.Context(), &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": v1alpha1.GroupVersion.String(), "kind": v1alpha1.Kind.Kind, "metadata": map[string]any{"name": s.prefix + name}, "spec": spec,
	}}, metav1.CreateOptions{})
	require.NoError(s.t, err)
}

// status waits until the status of a resource passes check.
func (s *system) status(name string, check func(v1alpha1.ImagePullSecretStatus) error) v1alpha1.ImagePullSecretStatus {
	s.t.Helper()
	r := &v1alpha1.ImagePullSecret{}
	s.eventually(func() error {
		object, err := s.dynamic.Resource(v1alpha1.Resource).Get(s.t.Context(), s.prefix+name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		*r = v1alpha1.ImagePullSecret{}
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(object.Object, r); err != nil {
			return err
		}
		if err := check(r.Status); err != nil {
			return fmt.Errorf("%w; status: %+v", err, r.Status)
		}
		return nil
	}, "the status of %s does not come", name)
	return r.Status
}

// retarget changes the name of a resource's target Secret.
func (s *system) retarget(name, secret string) {
	s.t.Helper()
	patch := []byte(`{"spec":{"target":{"secret":{"name":"` + secret + `"}}}}`)
	_, err := s.dynamic.Resource(v1alpha1.Resource).Patch(s.t.Context(), s.prefix+name, types.MergePatchType, patch, metav1.PatchOptions{})
	require.NoError(s.t, err)
}

func ready(status v1alpha1.ImagePullSecretStatus) error {
	if status.Status != v1alpha1.StatusReady {
		return errors.New("it is not Ready")
	}
	return nil
}

// failed is for status: Failed, with a reason that says so.
func failed(text string) func(v1alpha1.ImagePullSecretStatus) error {
	return func(status v1alpha1.ImagePullSecretStatus) error {
		if status.Status != v1alpha1.StatusFailed || !strings.Contains(status.Reason, text) {
			return fmt.Errorf("it does not fail as %q", text)
		}
		return nil
	}
}

// auth is the credentials for a registry in a namespace's Secret.
type auth struct{ Username, Password, Auth string }

// auths are all credentials in a namespace's Secret, and the Secret.
func (s *system) auths(namespace string) (map[string]auth, *corev1.Secret, error) {
	secret, err := s.core.CoreV1().Secrets(namespace).Get(s.t.Context(), imps.SecretName, metav1.GetOptions{})
	if err != nil {
		return nil, nil, err
	}
	var config struct {
		Auths map[string]auth `json:"auths"`
	}
	err = json.Unmarshal(secret.Data[corev1.DockerConfigJsonKey], &config)
	return config.Auths, secret, err
}

// opens waits until the Secret of a namespace opens a registry of ECR, and returns the grant.
func (s *system) opens(namespace, host, region string, public bool) fakeaws.Grant {
	s.t.Helper()
	var grant fakeaws.Grant
	s.eventually(func() error {
		auths, _, err := s.auths(namespace)
		if err != nil {
			return err
		}
		a, ok := auths[host]
		if !ok || !s.aws.Opens(region, public, a.Username, a.Password) {
			return fmt.Errorf("it has credentials for %d registries, and none that opens %s", len(auths), host)
		}
		i := slices.IndexFunc(s.aws.Grants(), func(g fakeaws.Grant) bool { return g.Password == a.Password })
		grant = s.aws.Grants()[i]
		return nil
	}, "the Secret of %s opens nothing", namespace)
	return grant
}

// mints are the tokens that were asked for since the last time.
func (s *system) mints() int {
	return len(slices.DeleteFunc(s.aws.Calls(), func(c fakeaws.Call) bool { return c.Action != "GetAuthorizationToken" }))
}

// history are the revisions of the pull Secrets of some namespaces, and their UIDs.
type history struct {
	mu   sync.Mutex
	seen map[string][]string
	uids map[string]map[string]struct{}
}

// watch records every change of the pull Secrets from now on.
func (s *system) watch() *history {
	s.t.Helper()
	h := &history{seen: map[string][]string{}, uids: map[string]map[string]struct{}{}}
	list, err := s.core.CoreV1().Secrets("").List(s.t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + imps.SecretName})
	require.NoError(s.t, err)
	w, err := s.core.CoreV1().Secrets("").Watch(s.t.Context(), metav1.ListOptions{
		FieldSelector: "metadata.name=" + imps.SecretName, ResourceVersion: list.ResourceVersion,
	})
	require.NoError(s.t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for event := range w.ResultChan() {
			secret, ok := event.Object.(*corev1.Secret)
			if !ok || event.Type == watch.Deleted {
				continue
			}
			h.mu.Lock()
			h.seen[secret.Namespace] = append(h.seen[secret.Namespace], secret.Annotations[impsync.AnnotationRevision])
			if h.uids[secret.Namespace] == nil {
				h.uids[secret.Namespace] = map[string]struct{}{}
			}
			h.uids[secret.Namespace][string(secret.UID)] = struct{}{}
			h.mu.Unlock()
		}
	}()
	s.t.Cleanup(func() {
		w.Stop()
		<-done
	})
	return h
}

// writes are how often the Secret of a namespace was written, and how many Secrets those were.
func (h *history) writes(namespace string) (writes, secrets int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.seen[namespace]), len(h.uids[namespace])
}

// hub starts a registry that lets in whoever has a good token for the region.
func (s *system) hub(host, region string) *registry.Registry {
	s.t.Helper()
	r, err := registry.Start(s.t.Context(), control, distribution, s.dir, s.aws, host, region)
	require.NoError(s.t, err)
	s.t.Cleanup(r.Stop)
	return r
}

// pull pulls the image with what a namespace's Secret has for it.
func (s *system) pull(namespace string, r *registry.Registry) error {
	secret, err := s.core.CoreV1().Secrets(namespace).Get(s.t.Context(), imps.SecretName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	return r.Pull(s.t.Context(), secret)
}
