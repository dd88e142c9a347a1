package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http/httptest"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/test/fakeaws"
	"github.com/imps-node/imps/test/registry"
)

const (
	ecrNamespace = "vision"
	ecrHost      = "123456789012.dkr.ecr.eu-central-1.amazonaws.com"
	ecrRegion    = "eu-central-1"
	// tokenLife replaces the twelve hours of a token.
	tokenLife = 12 * time.Second
)

// ecrResource is what the step about ECR is about; the audience sees it.
const ecrResource = `apiVersion: images.banzaicloud.io/v1alpha1
kind: ImagePullSecret
metadata:
  name: demo-ecr
spec:
  registry:
    credentials:
    - ecr: {registries: [` + ecrHost + `]}
  target:
    secret: {name: ` + secretName + `}
    namespaces: {names: [` + ecrNamespace + `]}
`

// startAWS starts an AWS that knows the coordinator, and returns the coordinator's settings for it.
func (d *demo) startAWS() []string {
	key := fakeaws.Key{AccessKeyID: "AKIADEMO", SecretAccessKey: rand.Text(), Principal: "arn:aws:iam::123456789012:user/coordinator"}
	d.aws = fakeaws.New()
	d.aws.Life = tokenLife
	d.aws.AddKey(key)
	d.awsServer = httptest.NewServer(d.aws)
	return []string{
		"AWS_ENDPOINT_URL_ECR=" + d.awsServer.URL, "AWS_ENDPOINT_URL_STS=" + d.awsServer.URL, "AWS_EC2_METADATA_DISABLED=true",
		"AWS_CONFIG_FILE=" + os.DevNull, "AWS_SHARED_CREDENTIALS_FILE=" + os.DevNull,
		"AWS_ACCESS_KEY_ID=" + key.AccessKeyID, "AWS_SECRET_ACCESS_KEY=" + key.SecretAccessKey,
	}
}

// stopAWS ends what stands for AWS.
func (d *demo) stopAWS() {
	if d.registry != nil {
		d.registry.Stop()
	}
	if d.awsServer != nil {
		d.awsServer.CloseClientConnections()
		d.awsServer.Close()
	}
}

// ecr shows that a token opens a registry, and that the next one is there before it expires.
func (d *demo) ecr(ctx context.Context) error {
	d.note("An AWS that verifies signatures, on loopback, whose tokens live %.0f seconds instead of twelve hours; and a private "+
		"registry that lets in whoever has one.", tokenLife.Seconds())
	var err error
	if d.registry, err = registry.Start(ctx, d.control, d.distribution, d.dir, d.aws, ecrHost, ecrRegion); err != nil {
		return err
	}
	nothing := &corev1.Secret{Type: corev1.SecretTypeDockerConfigJson, Data: map[string][]byte{
		corev1.DockerConfigJsonKey: fmt.Appendf(nil, `{"auths":{%q:{"username":"AWS","password":"guessed"}}}`, ecrHost),
	}}
	d.check("with a guess for a token the registry refuses the pull", true, d.registry.Pull(ctx, nothing) != nil)

	if err := d.newNamespace(ctx, ecrNamespace); err != nil {
		return err
	}
	d.say("\n   | %s", strings.ReplaceAll(strings.TrimSpace(ecrResource), "\n", "\n   | "))
	if err := d.control.Apply(ctx, []byte(ecrResource)); err != nil {
		return err
	}
	var first *corev1.Secret
	if err := eventually(ctx, "the Secret of "+ecrNamespace+" opens the registry", func(ctx context.Context) (err error) {
		first, err = d.pull(ctx)
		return err
	}); err != nil {
		return err
	}
	d.note("The token in the Secret of %s opens the registry: %s is pulled.", ecrNamespace, d.registry.Image)
	d.done("a token of ECR, in the Secret, opens the registry")

	pulls, refused := 0, 0
	var second *corev1.Secret
	for deadline := time.Now().Add(within); second == nil && time.Now().Before(deadline); pulls++ {
		secret, err := d.pull(ctx)
		if err != nil {
			refused++
		} else if secret.ResourceVersion != first.ResourceVersion {
			second = secret
		}
	}
	if second == nil {
		return fmt.Errorf("no new token within %s", within)
	}
	d.note("At half of its life a new one has come, after %d pulls without a gap.", pulls)
	d.check("none of the pulls meanwhile was refused", 0, refused)
	d.check("the Secret was changed in place", first.UID, second.UID)
	d.check("AWS was asked for a token twice, once for each", 2, len(d.aws.Grants()))
	if d.keep {
		return nil
	}
	if err := d.rest().Delete().AbsPath(resources(), "demo-ecr").Do(ctx).Error(); err != nil {
		return fmt.Errorf("delete the ImagePullSecret: %w", err)
	}
	_, err = d.watcher.await(ctx, ecrNamespace, "deleted", deleted)
	return err
}

// pull pulls the image with what the namespace's Secret has for it.
func (d *demo) pull(ctx context.Context) (*corev1.Secret, error) {
	secret, err := d.client.CoreV1().Secrets(ecrNamespace).Get(ctx, secretName, metav1.GetOptions{})
	if err != nil {
		return nil, err
	}
	return secret, d.registry.Pull(ctx, secret)
}
