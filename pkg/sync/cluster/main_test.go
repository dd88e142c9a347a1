package cluster

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/workqueue"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
	"sigs.k8s.io/yaml"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

func TestMain(m *testing.M) {
	// The second of them limits the rate of errors by one clock for the whole process, which
	// the bubbles of synctest must not share.
	utilruntime.ErrorHandlers = utilruntime.ErrorHandlers[:1]
	goleak.VerifyTestMain(m)
}

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

// requireSilent fails where a text holds the canary, in clear or in base64 at any offset.
func requireSilent(t *testing.T, text string) {
	t.Helper()
	require.NotContains(t, text, canary)
	for offset := range 3 {
		encoded := base64.StdEncoding.EncodeToString([]byte("xx"[:offset] + canary))
		require.NotContains(t, text, encoded[4:len(encoded)-4])
	}
}

// noServer is a connection to an API server that is not there.
type noServer struct {
	mu       sync.Mutex
	requests []string
	// refusal is what the server answers to everything, where it is there after all.
	refusal *apierrors.StatusError
	// resources are all that are there, where it answers to that.
	resources []*v1alpha1.ImagePullSecret
	// answers are what it answers to single requests, a Status or an object.
	answers map[string]any
	// accepts: it takes what is written in protobuf or applied, and answers with the UID "there".
	accepts bool
	// before is called before a request is answered.
	before func(*http.Request)
}

func (n *noServer) RoundTrip(request *http.Request) (*http.Response, error) {
	if n.before != nil {
		n.before(request)
		if err := request.Context().Err(); err != nil {
			return nil, err
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.requests = append(n.requests, request.Method+" "+request.URL.Path)
	answer := func(code int, content any) (*http.Response, error) {
		body, err := json.Marshal(content)
		return &http.Response{
			StatusCode: code, Header: http.Header{"Content-Type": {"application/json"}}, Body: io.NopCloser(bytes.NewReader(body)), Request: request,
		}, err
	}
	if content, ok := n.answers[request.Method+" "+request.URL.Path]; ok {
		if refusal, ok := content.(*apierrors.StatusError); ok {
			status := refusal.Status()
			status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
			return answer(int(status.Code), status)
		}
		return answer(http.StatusOK, content)
	}
	if n.resources != nil && request.Method+" "+request.URL.Path == listOfResources {
		list := metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadataList"}}
		for _, r := range n.resources {
			list.Items = append(list.Items, metav1.PartialObjectMetadata{ObjectMeta: r.ObjectMeta})
		}
		return answer(http.StatusOK, list)
	}
	if n.accepts && (request.Method == http.MethodPost || request.Method == http.MethodPatch) {
		secret := corev1.Secret{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}}
		if request.Method == http.MethodPatch {
			if err := json.NewDecoder(request.Body).Decode(&secret); err != nil {
				return nil, err
			}
		}
		secret.UID, secret.ResourceVersion = "there", strconv.Itoa(1000+len(n.requests))
		return answer(http.StatusOK, secret)
	}
	if n.refusal == nil {
		return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	}
	status := n.refusal.Status()
	status.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}
	return answer(int(status.Code), status)
}

// slow has every answer take so long.
func (n *noServer) slow(each time.Duration) {
	n.before = func(request *http.Request) {
		select {
		case <-time.After(each):
		case <-request.Context().Done():
		}
	}
}

// Requests.
const (
	listOfNamespaces = "GET /api/v1/namespaces"
	listOfResources  = "GET /apis/images.banzaicloud.io/v1alpha1/imagepullsecrets"
	listOfReports    = "GET /api/v1/namespaces/imps-system/configmaps"
	writeOfSecret    = "PATCH /api/v1/namespaces/n/secrets/pull"
	readOfSecret     = "GET /api/v1/namespaces/n/secrets/pull"
	deletion         = "DELETE /api/v1/namespaces/n/secrets/pull"
)

var noNamespaces = metav1.PartialObjectMetadataList{TypeMeta: metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadataList"}}

// asAnswer is what a server says that is asked for this Secret.
func asAnswer(m *metav1.PartialObjectMetadata) *metav1.PartialObjectMetadata {
	m = m.DeepCopy()
	m.TypeMeta, m.ResourceVersion = metav1.TypeMeta{APIVersion: "meta.k8s.io/v1", Kind: "PartialObjectMetadata"}, "101"
	return m
}

// reports are those of one node, which demands a Secret of these resources in the namespace n.
func reports(t *testing.T, uids ...types.UID) corev1.ConfigMapList {
	t.Helper()
	data, err := impsync.Report{Node: "n1", FormatVersions: impsync.FormatVersions(), Demand: map[string][]types.UID{"n": uids}}.Encode()
	require.NoError(t, err)
	return corev1.ConfigMapList{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "ConfigMapList"},
		Items:    []corev1.ConfigMap{{ObjectMeta: metav1.ObjectMeta{Name: impsync.ReportName("n1")}, Data: data}},
	}
}

// asked returns the requests since the last call.
func (n *noServer) asked() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	requests := n.requests
	n.requests = nil
	return requests
}

func (t *term) server() *noServer { return t.config.Client.Transport.(*noServer) }

// newTestTerm returns a term that knows nothing. Nothing in it runs, and its clients have
// no server.
func newTestTerm(t *testing.T) *term {
	t.Helper()
	registry := prometheus.NewRegistry()
	c, err := New(Config{
		Namespace: "imps-system", RenderedNamespace: "imps-rendered", Identity: "test",
		TargetSecretNames: []string{"pull", "other"}, SourceNamespaces: []string{"registry-access"},
		Excluded: impsync.Exclusion{"kube-*"},
		Client:   &rest.Config{Host: "http://api.invalid", QPS: -1, Transport: &noServer{}},
		Metrics:  impsync.NewMetrics(registry),
		Registry: registry, Log: slog.New(slog.DiscardHandler),
	})
	require.NoError(t, err)
	held := time.Now().AddDate(100, 0, 0)
	c.guard.renewed.Store(&held)
	term := newTerm(c, record.NewFakeRecorder(100))
	term.started = true
	t.Cleanup(func() {
		term.resourceQueue.ShutDown()
		term.targetQueue.ShutDown()
		term.statusQueue.ShutDown()
		term.reportQueue.ShutDown()
		term.accountQueue.ShutDown()
		term.rescueQueue.ShutDown()
	})
	return term
}

// drain takes what is ready out of a queue, sorted as text.
func drain[K comparable](queue workqueue.TypedRateLimitingInterface[K], text func(K) string) []string {
	var items []string
	for queue.Len() > 0 {
		item, _ := queue.Get()
		queue.Done(item)
		items = append(items, text(item))
	}
	slices.Sort(items)
	return items
}

func (t *term) queuedTargets() []string {
	return drain(t.targetQueue, targetKey.String)
}

func (t *term) queuedResources() []string {
	return drain(t.resourceQueue, func(uid types.UID) string { return string(uid) })
}

func (t *term) queuedAccounts() []string {
	return drain(t.accountQueue, func(namespace string) string { return namespace })
}

func (t *term) queuedStatuses() []string {
	return drain(t.statusQueue, func(uid types.UID) string { return string(uid) })
}

// noon is when the oldest of all test resources was created.
var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// resource returns an ImagePullSecret that was created so many minutes after noon. Its UID
// is "uid-" and its name.
func resource(t *testing.T, name string, minutes int, target string) *v1alpha1.ImagePullSecret {
	t.Helper()
	r := &v1alpha1.ImagePullSecret{
		TypeMeta: metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion.String(), Kind: v1alpha1.Kind.Kind},
		ObjectMeta: metav1.ObjectMeta{
			Name: name, UID: types.UID("uid-" + name), Generation: 1,
			CreationTimestamp: metav1.NewTime(noon.Add(time.Duration(minutes) * time.Minute)),
		},
	}
	require.NoError(t, yaml.UnmarshalStrict([]byte(target), &r.Spec.Target))
	return r
}

// renderedAt is the rendered form of a resource at a counter.
func renderedAt(t *testing.T, r *v1alpha1.ImagePullSecret, counter uint64) impsync.Rendered {
	t.Helper()
	target, err := impsync.NewTarget(impsync.RefOf(r), r.Spec.Target.Secret, counter, dockerconfig.NewSensitive(`{"auths":{"r.io":{"password":"`+canary+`"}}}`))
	require.NoError(t, err)
	return impsync.Rendered{FormatVersion: 1, Resource: impsync.RefOf(r), Namespaces: r.Spec.Target.Namespaces, Pods: r.Spec.Target.NamespacesWithPods, Rescue: r.Spec.Target.Rescue, Target: target}
}

// claimOf puts a resource in force that was rendered at a counter.
func (t *term) claimOf(tt *testing.T, r *v1alpha1.ImagePullSecret, counter uint64) *claim {
	tt.Helper()
	c := newClaim(r, renderedAt(tt, r, counter))
	c.unread = false
	c.generation, c.settled = r.Generation, r.Generation
	t.byUID[r.UID] = r
	t.claims[r.UID] = c
	name := r.Spec.Target.Secret.Name
	if t.byTarget[name] == nil {
		t.byTarget[name] = map[types.UID]*claim{}
	}
	t.byTarget[name][r.UID] = c
	return c
}

// applied is the metadata of the Secret that an apply of a target leaves behind.
func applied(t *testing.T, namespace string, target impsync.Target) *metav1.PartialObjectMetadata {
	t.Helper()
	var s corev1.Secret
	require.NoError(t, json.Unmarshal(target.Body("", ""), &s))
	fields := fieldpath.NewSet(fieldpath.MakePathOrDie("type"), fieldpath.MakePathOrDie("data", corev1.DockerConfigJsonKey))
	for key := range s.Labels {
		fields.Insert(fieldpath.MakePathOrDie("metadata", "labels", key))
	}
	for key := range s.Annotations {
		fields.Insert(fieldpath.MakePathOrDie("metadata", "annotations", key))
	}
	for _, owner := range s.OwnerReferences {
		fields.Insert(fieldpath.MakePathOrDie("metadata", "ownerReferences", fieldpath.KeyByFields("uid", string(owner.UID))))
	}
	raw, err := fields.ToJSON()
	require.NoError(t, err)
	m := &metav1.PartialObjectMetadata{ObjectMeta: s.ObjectMeta}
	m.Namespace, m.UID, m.ResourceVersion = namespace, types.UID("secret-in-"+namespace), "100"
	m.ManagedFields = []metav1.ManagedFieldsEntry{{
		Manager: impsync.FieldManager, Operation: metav1.ManagedFieldsOperationApply, APIVersion: "v1", FieldsType: "FieldsV1",
		FieldsV1: metav1.NewFieldsV1(string(raw)),
	}}
	return m
}

// mirrorOf has the term know these Secrets, and no others, as those of a name.
func (t *term) mirrorOf(tt *testing.T, name string, secrets ...*metav1.PartialObjectMetadata) {
	tt.Helper()
	list := &metav1.PartialObjectMetadataList{ListMeta: metav1.ListMeta{ResourceVersion: "1"}}
	for _, m := range secrets {
		require.Equal(tt, name, m.Name)
		list.Items = append(list.Items, *m)
	}
	t.targets[name] = synced(tt, impsync.MirrorConfig[impsync.Existing]{
		Name: "Secrets named " + name, Example: &metav1.PartialObjectMetadata{}, Log: t.log,
		Convert: func(o runtime.Object) impsync.Existing { return impsync.ExistingOf(o.(*metav1.PartialObjectMetadata)) },
		Version: func(x impsync.Existing) string { return x.ResourceVersion },
	}, list)
}

// synced returns a Mirror that has read a list and then lost its server.
func synced[T any](t *testing.T, config impsync.MirrorConfig[T], list runtime.Object) *impsync.Mirror[T] {
	t.Helper()
	config.ListWatch = &cache.ListWatch{
		ListWithContextFunc: func(context.Context, metav1.ListOptions) (runtime.Object, error) { return list, nil },
		WatchFuncWithContext: func(_ context.Context, options metav1.ListOptions) (watch.Interface, error) {
			if options.SendInitialEvents != nil {
				return nil, errors.New("not supported")
			}
			return watch.NewFake(), nil
		},
	}
	mirror := impsync.NewMirror(config)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		mirror.Run(ctx)
	}()
	<-mirror.Synced()
	cancel()
	<-done
	return mirror
}

// namespace has the term know a namespace.
func (t *term) namespace(name string, labels map[string]string) {
	t.namespaces.Put(types.NamespacedName{Name: name}, namespaceMeta{labels: labels})
}

// node has the term know a node, and its report where there is one.
func (t *term) node(name string, reports bool) {
	t.nodes.Put(types.NamespacedName{Name: name}, struct{}{})
	if reports {
		t.reports.Put(types.NamespacedName{Namespace: t.config.Namespace, Name: impsync.ReportName(name)},
			reportObject{formats: impsync.FormatVersions()})
	}
	t.counted = nil
}

// kubelet has the term know a node whose agent has a node cache, and what is wrong with that.
func (t *term) kubelet(name, problem string) {
	t.nodes.Put(types.NamespacedName{Name: name}, struct{}{})
	t.reports.Put(types.NamespacedName{Namespace: t.config.Namespace, Name: impsync.ReportName(name)},
		reportObject{formats: impsync.FormatVersions(), kubelet: &impsync.KubeletReport{Problem: problem}})
	t.counted = nil
}

// configOf returns a config with one password for each registry: "registry=password".
func configOf(t *testing.T, registries ...string) dockerconfig.Config {
	t.Helper()
	var entries []dockerconfig.Entry
	for _, registry := range registries {
		key, password, _ := strings.Cut(registry, "=")
		entries = append(entries, dockerconfig.Entry{
			Key: dockerconfig.NewSensitive(key), Username: dockerconfig.NewSensitive("u"), Password: dockerconfig.NewSensitive(password),
		})
	}
	config, err := dockerconfig.New(entries...)
	require.NoError(t, err)
	return config
}

// noise is so many bytes that do not compress.
func noise(n int) string {
	random := rand.New(rand.NewPCG(1, 2))
	raw := make([]byte, n)
	for i := range raw {
		raw[i] = byte(random.UintN(256))
	}
	return base64.StdEncoding.EncodeToString(raw)[:n]
}

// plain is the inverse of configOf.
func plain(config dockerconfig.Config) []string {
	var registries []string
	for _, e := range config.Entries() {
		registries = append(registries, e.Key.Reveal()+"="+e.Password.Reveal())
	}
	slices.Sort(registries)
	return registries
}

// sprintAll prints a value in every way.
func sprintAll(value any) string {
	return fmt.Sprintf("%v\n%+v\n%#v\n%s\n%x", value, value, value, value, value)
}
